"""The demo evaluation: its batched answers are those of phi35.generate, its table counts rightly."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import phi35
from phi35 import presets
from phi35.evaluation.batched import Question, answer
from phi35.evaluation.demo import evaluate, summarise, table
from phi35.processor import Processor
from vision.easy_vqa import VisualQuestion, evaluation_questions

SMALL_MODEL = Path(presets.__file__).parent / "small_model"


@pytest.fixture(scope="module")
def loaded() -> tuple[object, Processor]:
    # Weights twice as wide as usual, so that a random model's answers differ from question to question.
    model = phi35.create("tiny-phi-3.5-vision", seed=3, initializer_range=0.2, vision={"num_crops": 1})
    return model.eval(), Processor.from_folder(SMALL_MODEL, model.config)


def test_batched_answers_are_those_of_generate(loaded: tuple[object, Processor]) -> None:
    model, processor = loaded
    split, questions = evaluation_questions()
    asked = [*questions[:6], *questions[-8:]]
    pictures = split.image_paths
    answers = answer(
        model, processor, [Question(q.prompt, q.images) for q in asked], pictures, batch_size=5, max_new_tokens=6
    )
    alone = [
        phi35.generate(
            q.prompt, images=[pictures[image] for image in q.images], model=(model, processor), max_new_tokens=6
        )
        for q in asked
    ]
    assert answers == alone
    assert len(set(answers)) > 3


def test_drawn_answers_follow_the_scores_and_the_seed(loaded: tuple[object, Processor]) -> None:
    """A question asked many times: its first tokens come as often as the model's chances say."""
    model, processor = loaded
    picture = Image.new("RGB", (64, 64), "teal")
    asked = [Question("<|image_1|>\nwhat?", ("one",))] * 600
    options = {"batch_size": 300, "max_new_tokens": 1, "temperature": 2.0}
    drawn, again, other = (answer(model, processor, asked, {"one": picture}, seed=s, **options) for s in (1, 1, 2))
    assert drawn == again and drawn != other
    text = processor.apply_chat_template([{"role": "user", "content": asked[0].prompt}])
    with torch.inference_mode():
        chances = (model(**processor(text, images=[picture])).logits[0, -1] / 2.0).softmax(dim=-1)
    first = drawn[0]
    same = [token for token in range(len(chances)) if processor.decode([token]) == first]
    expected = float(chances[same].sum())
    for counts in (drawn.count(first), other.count(first)):
        assert abs(counts / 600 - expected) <= 4 * (expected * (1 - expected) / 600) ** 0.5
    with pytest.raises(ValueError, match="temperature"):
        answer(model, processor, asked[:1], {"one": picture}, temperature=-1.0)


def test_pictures_that_are_not_there_are_named(loaded: tuple[object, Processor]) -> None:
    with pytest.raises(ValueError, match="absent"):
        answer(*loaded, [Question("<|image_1|>\nwhat?", ("absent",))], {})


def test_limit_takes_so_many_of_each_kind(loaded: tuple[object, Processor]) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(*loaded, limit=2, progress=lambda done, total: seen.append((done, total)))
    assert [score.count for score in result.scores] == [2] * 10
    assert result.single is not None and result.pairs is not None
    assert (result.single.count, result.pairs.count) == (6, 14)
    assert seen[-1] == (20, 20)
    json.dumps(result.to_dict())
    assert len(table(result)) == 12
    with pytest.raises(ValueError, match="limit"):
        evaluate(*loaded, limit=0)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(*loaded, batch_size=0)


def test_a_text_model_is_refused() -> None:
    with pytest.raises(ValueError, match="text-only"):
        evaluate(phi35.create("tiny-phi-3.5-mini", seed=0), None)


def test_scores_and_baselines_count_by_kind() -> None:
    def ask(question: str, expected: str, kind: str, images: tuple[int, ...] = (1,)) -> VisualQuestion:
        return VisualQuestion(question=question, answer=expected, images=images, kind=kind)

    questions = [
        ask("a?", "yes", "yes/no"),
        ask("a?", "yes", "yes/no"),
        ask("b?", "no", "yes/no"),
        ask("c?", "red", "color"),
        ask("which?", "first", "which image", (1, 2)),
    ]
    result = summarise(questions, ["Yes ", "no", "no", "blue", "first"], 1.0)
    by_kind = {score.kind: score for score in result.scores}
    assert (by_kind["yes/no"].correct, by_kind["yes/no"].majority, by_kind["yes/no"].wording) == (2, 2, 3)
    assert (by_kind["color"].correct, by_kind["color"].count) == (0, 1)
    assert result.single is not None and (result.single.correct, result.single.count) == (2, 4)
    assert result.pairs is not None and result.pairs.accuracy == 1.0
    assert [mistake["answer"] for mistake in result.mistakes] == ["no", "blue"]


def test_the_wording_alone_gives_what_is_known_of_easy_vqa() -> None:
    _, questions = evaluation_questions()
    scores = {score.kind: score for score in summarise(questions, [""] * len(questions), 0.0).scores}
    yes_no = scores["yes/no"]
    assert round(100 * yes_no.wording / yes_no.count, 1) == 82.5
