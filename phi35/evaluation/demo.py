"""The demo evaluation: easy-vqa's test questions and two-image questions built from its test pictures.

Beside each accuracy stand two baselines that see no picture: the most frequent answer of the kind, and the most
frequent answer to the very wording (both chosen on the questions they are scored on, hence upper bounds).
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phi35.evaluation.batched import Question, answer
from phi35.registry import resolve

QUESTIONS = "vision.easy_vqa:evaluation_questions"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy on one kind of question.

    Attributes:
        kind: what is asked.
        images: pictures in each question.
        count: number of questions.
        correct: answers that equal the expected one, lower-cased and stripped.
        majority: questions that the kind's most frequent answer gets right.
        wording: questions that the most frequent answer to the same wording gets right.
    """

    kind: str
    images: int
    count: int
    correct: int
    majority: int
    wording: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.count


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Scores by kind and in sum, the wrong answers and the time in seconds."""

    scores: tuple[Score, ...]
    single: Score | None
    pairs: Score | None
    mistakes: tuple[dict[str, Any], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for one JSON line."""
        sums = {"single_image": self.single, "two_images": self.pairs}
        return {
            **{
                name: None if score is None else {"count": score.count, "accuracy": round(score.accuracy, 5)}
                for name, score in sums.items()
            },
            "kinds": {
                score.kind: {"count": score.count, "accuracy": round(score.accuracy, 5)} for score in self.scores
            },
            "seconds": round(self.seconds, 1),
        }


def evaluate(
    model: Any,
    processor: Any,
    *,
    limit: int | None = None,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> DemoResult:
    """Asks a model the demo questions, greedily.

    Args:
        model: a ``phi35.model.CausalLM`` with vision.
        processor: the model's.
        limit: most questions of each kind, evenly spread; None for all.
        batch_size: questions that run together.
        progress: called with (questions answered, questions in all).

    Raises:
        ValueError: for a limit or batch size below 1, or a model without vision.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question of each kind, got {limit}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.config.vision is None:
        raise ValueError("the demo asks about pictures, and this model is text-only: give a vision model")
    split, questions = resolve(QUESTIONS)()
    questions = questions if limit is None else _spread(questions, limit)
    started = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(questions))

    asked = [Question(question.prompt, question.images) for question in questions]
    answers = answer(model, processor, asked, split.image_paths, batch_size=batch_size, progress=advance)
    return summarise(questions, answers, time.monotonic() - started)


def summarise(questions: Sequence[Any], answers: Sequence[str], seconds: float) -> DemoResult:
    """Scores of given answers.

    Args:
        questions: with ``question``, ``answer``, ``images`` and ``kind``.
        answers: one for each.
        seconds: time that answering took.
    """
    given = [text.strip().lower() for text in answers]
    by_kind: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_kind[len(question.images), question.kind].append(index)
    scores = tuple(_score(kind, number, questions, given, indices) for (number, kind), indices in by_kind.items())
    mistakes = tuple(
        {"question": question.prompt, "images": question.images, "expected": question.answer, "answer": text}
        for question, text in zip(questions, given, strict=True)
        if text != question.answer
    )
    return DemoResult(scores=scores, single=_sum(scores, 1), pairs=_sum(scores, 2), mistakes=mistakes, seconds=seconds)


def table(result: DemoResult) -> list[dict[str, Any]]:
    """Rows for the command line: single-image kinds and their sum, then two-image kinds and theirs."""
    rows = []
    for number, total in ((1, result.single), (2, result.pairs)):
        rows += [_row(score) for score in result.scores if score.images == number]
        if total is not None:
            rows.append(_row(total))
    return rows


def _row(score: Score) -> dict[str, Any]:
    return {
        "questions": score.kind,
        "images": score.images,
        "count": score.count,
        "accuracy %": _percent(score.correct, score.count),
        "majority %": _percent(score.majority, score.count),
        "wording alone %": _percent(score.wording, score.count),
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}".rjust(6)


def _score(kind: str, images: int, questions: Sequence[Any], given: list[str], indices: list[int]) -> Score:
    expected = [questions[index].answer for index in indices]
    by_wording: dict[str, Counter[str]] = defaultdict(Counter)
    for index in indices:
        by_wording[questions[index].question][questions[index].answer] += 1
    return Score(
        kind=kind,
        images=images,
        count=len(indices),
        correct=sum(given[index] == questions[index].answer for index in indices),
        majority=Counter(expected).most_common(1)[0][1],
        wording=sum(answers.most_common(1)[0][1] for answers in by_wording.values()),
    )


def _sum(scores: Sequence[Score], images: int) -> Score | None:
    chosen = [score for score in scores if score.images == images]
    if not chosen:
        return None
    sums = {name: sum(getattr(score, name) for score in chosen) for name in ("count", "correct", "majority", "wording")}
    return Score(kind="all single-image" if images == 1 else "all two-image", images=images, **sums)


def _spread(questions: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` questions of each kind, evenly spaced, in their order."""
    by_kind: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_kind[len(question.images), question.kind].append(index)
    chosen = []
    for indices in by_kind.values():
        count = min(limit, len(indices))
        chosen += [indices[place * len(indices) // count] for place in range(count)]
    return [questions[index] for index in sorted(chosen)]
