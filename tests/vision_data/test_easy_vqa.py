"""easy-vqa: what questions say about pictures, balance, and the wall between train and test."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from vision.easy_vqa import (
    COLORS,
    SHAPES,
    PairQuestions,
    Split,
    VisualQuestion,
    balanced_yes_no,
    derive_attributes,
    evaluation_questions,
    load_split,
)
from vision.easy_vqa_shards import prepare
from vision.shards import ShardIndex


@pytest.fixture(scope="module")
def train() -> Split:
    return load_split("train")


def ask(question: str, answer: str, kind: str) -> VisualQuestion:
    return VisualQuestion(question=question, answer=answer, images=(1,), kind=kind)


def test_attributes_follow_from_answers() -> None:
    excluded = [ask(f"is there a {color} shape?", "no", "yes/no") for color in COLORS if color != "teal"]
    shape = [ask("is no circle present?", "no", "yes/no")]
    (found,) = derive_attributes(excluded + shape).values()
    assert (found.color, found.shape) == ("teal", "circle")
    (found,) = derive_attributes([ask("what is the blue shape?", "rectangle", "shape")]).values()
    assert (found.color, found.shape) == ("blue", "rectangle")
    (found,) = derive_attributes([ask("is there not a red shape?", "yes", "yes/no")]).values()
    assert (found.color, found.shape) == (None, None)


def test_attributes_agree_with_every_question_of_the_package(train: Split) -> None:
    assert len(train.questions) == 38575 and len(train.image_paths) == 4000
    known = Counter((a.color is not None, a.shape is not None) for a in train.attributes.values())
    assert known[True, True] == 3578
    for question in train.questions:
        attributes = train.attributes[question.images[0]]
        if question.kind in ("color", "shape"):
            assert getattr(attributes, question.kind) == question.answer
    shown = {(q.question, q.answer) for i in (0, 1, 2) for q in balanced_yes_no(train, i)}
    package = {(q.question, q.answer) for q in train.questions}
    assert len(shown) > 16 and shown <= package  # the added wordings and their answers are the package's own


@pytest.mark.parametrize("kind", PairQuestions.KINDS)
def test_two_image_questions_are_true_and_balanced(train: Split, kind: str) -> None:
    import random

    pairs, rng = PairQuestions(train), random.Random(0)
    drawn = [pairs.draw(kind, rng) for _ in range(400)]
    answers = Counter(question.answer for question in drawn)
    number = {"color of one": 8, "shape of one": 3, "how many": 3, "what differs": 4}.get(kind, 2)
    assert len(answers) == number
    spread = 4 * (400 / number * (1 - 1 / number)) ** 0.5  # four standard deviations
    assert all(abs(count - 400 / number) < spread for count in answers.values()), answers
    for question in drawn:
        assert question.images[0] != question.images[1]
        assert question.answer == expected_answer(train, question), question


def expected_answer(split: Split, question: VisualQuestion) -> str:
    """The answer worked out from the words, another way than the questions are made."""
    shown = [split.attributes[image] for image in question.images]
    words = question.question.replace("?", "").split()
    same_color, same_shape = shown[0].color == shown[1].color, shown[0].shape == shown[1].shape
    if question.kind == "what differs":
        return {(1, 1): "nothing", (0, 1): "color", (1, 0): "shape", (0, 0): "both"}[same_color, same_shape]
    if question.kind.startswith("same"):
        return "yes" if (same_color if "color" in words else same_shape) else "no"
    if question.kind.endswith("of one"):
        return getattr(shown[words.index("second") >= 0 if "second" in words else 0], question.kind.split()[0])
    named = [[word for word in words if word in values] for values in (COLORS, SHAPES)]
    fits = [
        (not named[0] or named[0][0] == item.color) and (not named[1] or named[1][0] == item.shape) for item in shown
    ]
    return ("zero", "one", "two")[sum(fits)] if question.kind == "how many" else ("first", "second")[fits.index(True)]


def test_the_evaluation_is_fixed_and_complete() -> None:
    split, questions = evaluation_questions()
    assert split.name == "test" and len(questions) == 9673 + 2100
    assert Counter(len(question.images) for question in questions) == {1: 9673, 2: 2100}
    assert questions == evaluation_questions()[1]
    digest = hashlib.sha256(repr([(q.prompt, q.answer, q.images) for q in questions]).encode()).hexdigest()
    assert digest == "8400a131422ff59a1b8ce1e568ed4f52c8bf085dc71823cede18a31f21b74e99"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    written = prepare(tmp_path_factory.mktemp("shards"), num_pairs=70)
    assert (written.num_pictures, written.num_pairs) == (4000, 70)
    return ShardIndex(written.folder)


def test_training_shards_hold_no_test_picture(index: ShardIndex) -> None:
    assert len(index) == 4070
    stored = {hashlib.sha256(file).hexdigest() for number in range(len(index)) for file in index.read_images(number)}
    hashes = {
        name: {hashlib.sha256(path.read_bytes()).hexdigest() for path in load_split(name).image_paths.values()}
        for name in ("train", "test")
    }
    assert stored == hashes["train"]
    assert not stored & hashes["test"]
    pairs = [index.describe(number) for number in np.flatnonzero(index.table.num_images == 2)]
    assert set(Counter(pair["kind"] for pair in pairs).values()) == {10}


def test_single_image_draws_balance_yes_and_no_by_wording(index: ShardIndex) -> None:
    weights: Counter[tuple[str, str]] = Counter()
    for number in range(len(index)):
        description = index.describe(number)
        if index.table.num_images[number] == 1:
            total = sum(item["weight"] for item in description["conversations"])
            for item in description["conversations"]:
                question, answer = (turn["content"].lower() for turn in item["messages"])
                if answer in ("yes", "no"):
                    weights["negated" if " not " in question or " no " in question else "plain", answer] += (
                        item["weight"] / total
                    )
    for form in ("plain", "negated"):
        share = weights[form, "yes"] / (weights[form, "yes"] + weights[form, "no"])
        assert abs(share - 0.5) < 0.05  # measured 0.50 and 0.50


def test_unknown_names_are_refused(train: Split) -> None:
    import random

    with pytest.raises(ValueError, match="validation"):
        load_split("validation")
    with pytest.raises(ValueError, match="riddle"):
        PairQuestions(train).draw("riddle", random.Random(0))
