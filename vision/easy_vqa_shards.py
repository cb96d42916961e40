"""Writing easy-vqa as webdataset shards: the questions about single train pictures, and about pairs of them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision.easy_vqa import COLORS, PairQuestions, Split, VisualQuestion, balanced_yes_no, load_split
from vision.shard_writer import ShardWriter

KIND_SHARES = {
    ("color", "named"): 0.22,
    ("color", "not named"): 0.22,
    ("shape", "named"): 0.08,
    ("shape", "not named"): 0.08,
    ("color", "asked"): 0.2,
    ("shape", "asked"): 0.2,
}
"""How a single picture's draws divide: by attribute, and by whether a yes/no question names what the picture shows,
names another value, or the question asks for the value. Yes/no questions about colours get the most: to compare one
of eight colours with a word is learned last."""


@dataclass(frozen=True)
class PreparedData:
    """What ``prepare`` wrote: the folder, the numbers of single-image and two-image samples, and its size."""

    folder: Path
    num_pictures: int
    num_pairs: int
    num_bytes: int


def prepare(
    folder: str | Path,
    split: str = "train",
    *,
    num_pairs: int = 24000,
    draws: int = 6,
    samples_per_shard: int = 1000,
    seed: int = 0,
) -> PreparedData:
    """Writes shards of one split.

    A sample of a single picture holds all its questions and is visited ``draws`` times an epoch; a sample of
    two pictures holds one question.

    Args:
        folder: where to.
        split: "train" or "test".
        num_pairs: number of two-image samples; their kinds take turns.
        draws: visits of a single picture in an epoch.
        samples_per_shard: size of the files.
        seed: of pairs, wordings and order.

    Raises:
        ValueError: for an unknown split or without the package easy-vqa.
    """
    source = load_split(split)
    rng = random.Random(seed)
    contents = {image_id: path.read_bytes() for image_id, path in source.image_paths.items()}
    by_image: dict[int, list[VisualQuestion]] = {}
    for question in source.questions:
        by_image.setdefault(question.images[0], []).append(question)
    samples = [_single(source, by_image[image_id], draws, rng) for image_id in sorted(by_image)]
    pairs = PairQuestions(source)
    samples += [_pair(pairs.draw(pairs.KINDS[i % len(pairs.KINDS)], rng), split, i, rng) for i in range(num_pairs)]
    rng.shuffle(samples)
    with ShardWriter(folder, samples_per_shard) as writer:
        for key, description, image_ids in samples:
            writer.write(key, description, [("png", contents[image_id]) for image_id in image_ids])
    size = sum(path.stat().st_size for path in writer.paths)
    return PreparedData(Path(folder), len(by_image), num_pairs, size)


def _single(
    split: Split, questions: list[VisualQuestion], draws: int, rng: random.Random
) -> tuple[str, dict[str, Any], list[int]]:
    image_id = questions[0].images[0]
    groups: dict[tuple[str, str], list[VisualQuestion]] = {}
    for question in [*questions, *balanced_yes_no(split, image_id)]:
        groups.setdefault(_group(question), []).append(question)
    conversations = [
        _conversation(question, rng, KIND_SHARES[name] / len(group))
        for name, group in groups.items()
        for question in group
    ]
    description = {"source": f"easy-vqa {split.name} {image_id}", "draws": draws, "conversations": conversations}
    return f"{split.name}-{image_id}", description, [image_id]


def _pair(
    question: VisualQuestion, split: str, number: int, rng: random.Random
) -> tuple[str, dict[str, Any], list[int]]:
    images = list(question.images)
    prompt = question.prompt
    form = rng.random()
    if prompt != question.question and form < 0.1:
        # The tags may come in any order; what is shown first is "the first image".
        images.reverse()
        prompt = f"<|image_2|>\n<|image_1|>\n{question.question}"
    description = {
        "source": f"easy-vqa {split} {'+'.join(map(str, images))}",
        "kind": question.kind,
        **_conversation(question, rng, prompt=prompt),
    }
    return f"{split}-pair-{number}", description, images


def _conversation(
    question: VisualQuestion, rng: random.Random, weight: float = 1.0, prompt: str | None = None
) -> dict[str, Any]:
    text = prompt or question.prompt
    if rng.random() < 0.25:
        # People begin a question with a capital letter, the package does not.
        text = text.replace(question.question, question.question[0].upper() + question.question[1:])
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": question.answer}]
    return {"messages": messages, "weight": round(weight, 6)}


def _group(question: VisualQuestion) -> tuple[str, str]:
    """Attribute and kind of a single-image question (a key of ``KIND_SHARES``)."""
    if question.kind != "yes/no":
        return question.kind, "asked"
    attribute = "color" if any(color in question.question.split() for color in COLORS) else "shape"
    negated = " not " in question.question or " no " in question.question
    return attribute, "named" if (question.answer == "yes") != negated else "not named"
