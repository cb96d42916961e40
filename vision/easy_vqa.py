"""Questions about the easy-vqa pictures: the package's own, and two-image questions built from pairs.

easy-vqa (MIT) holds 4,000 train and 1,000 test pictures of 64x64 pixels, each with one coloured shape, and
48,248 questions with 13 possible answers. What a picture shows is derived from the questions and answers
of its own split alone. Two-image questions draw the answer first and a fitting pair after it, so that the
answers of every kind are balanced.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SPLITS = ("train", "test")
SINGLE_KINDS = ("yes/no", "color", "shape")
TEMPLATES = (
    ("is there a {} in the image?", "yes", "no"),
    ("is there a {}?", "yes", "no"),
    ("is a {} present?", "yes", "no"),
    ("does the image contain a {}?", "yes", "no"),
    ("is there not a {} in the image?", "no", "yes"),
    ("is there not a {}?", "no", "yes"),
    ("is no {} present?", "no", "yes"),
    ("does the image not contain a {}?", "no", "yes"),
)
"""The package's yes/no wordings: question, answer if the picture shows it, answer if not."""

_YES_NO = re.compile(
    rf"(?P<negated>.*\b(?:not|no)\b)?.*?\b(?:(?P<color>{'|'.join(COLORS)}) shape|(?P<shape>{'|'.join(SHAPES)}))\b"
)


@dataclass(frozen=True, kw_only=True)
class VisualQuestion:
    """One question about one or two pictures.

    Attributes:
        question: the text, with ``<|image_N|>`` tags where they do not simply come first.
        answer: the expected reply.
        images: picture ids of the split, in the order of their tags' numbers.
        kind: what is asked, a key of the evaluation table.
    """

    question: str
    answer: str
    images: tuple[int, ...]
    kind: str

    @property
    def prompt(self) -> str:
        """The question with its image tags in front, unless it carries tags already."""
        if "<|image_" in self.question:
            return self.question
        tags = "".join(f"<|image_{number}|>\n" for number in range(1, len(self.images) + 1))
        return tags + self.question


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What a picture shows, as far as its questions tell (None: they do not)."""

    color: str | None = None
    shape: str | None = None


@dataclass(frozen=True)
class Split:
    """One split of the package: questions in published order, picture files and what the pictures show."""

    name: str
    questions: tuple[VisualQuestion, ...]
    image_paths: dict[int, Path]
    attributes: dict[int, Attributes]


def load_split(name: str) -> Split:
    """Reads one split of the installed easy_vqa package.

    Args:
        name: "train" or "test".

    Raises:
        ValueError: for another name, or if easy_vqa is not installed.
    """
    if name not in SPLITS:
        raise ValueError(f"expected one of {SPLITS} as easy-vqa split, got {name!r}")
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("the easy-vqa questions need the package easy-vqa: pip install easy-vqa") from error
    texts, answers, image_ids = getattr(easy_vqa, f"get_{name}_questions")()
    paths = getattr(easy_vqa, f"get_{name}_image_paths")()
    questions = tuple(
        VisualQuestion(question=text, answer=answer, images=(image_id,), kind=single_kind(answer))
        for text, answer, image_id in zip(texts, answers, image_ids, strict=True)
    )
    image_paths = {image_id: Path(paths[image_id]) for image_id in sorted(paths)}
    return Split(name, questions, image_paths, derive_attributes(questions))


def single_kind(answer: str) -> str:
    """The kind of a single-image question, told by its answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "color" if answer in COLORS else "shape"


def derive_attributes(questions: Sequence[VisualQuestion]) -> dict[int, Attributes]:
    """What each picture shows, from questions and answers: direct answers, confirmed and excluded values."""
    possible: dict[int, dict[str, set[str]]] = {}
    for item in questions:
        values = possible.setdefault(item.images[0], {"color": set(COLORS), "shape": set(SHAPES)})
        for name, value, shown in _facts(item):
            values[name] &= {value} if shown else values[name] - {value}
    return {
        image_id: Attributes(**{name: next(iter(left)) if len(left) == 1 else None for name, left in values.items()})
        for image_id, values in possible.items()
    }


def _facts(item: VisualQuestion) -> list[tuple[str, str, bool]]:
    """(attribute, value, whether the picture shows it) that a question and its answer state."""
    if item.kind == "yes/no":
        match = _YES_NO.search(item.question)
        if match is None:
            raise ValueError(f"unknown easy-vqa question {item.question!r}")
        shown = (item.answer == "yes") != bool(match["negated"])
        name = "color" if match["color"] else "shape"
        return [(name, match[name], shown)]
    facts = [(item.kind, item.answer, True)]
    words = set(re.findall(r"[a-z]+", item.question))
    facts += [("color", color, True) for color in COLORS if color in words]
    facts += [("shape", shape, True) for shape in SHAPES if shape in words]
    return facts


def balanced_yes_no(split: Split, image_id: int) -> list[VisualQuestion]:
    """Extra yes/no questions in the package's wordings that name what the picture does show.

    The package's own ones mostly name what the picture does not show, so that the wording alone gives
    82.5 % of the test answers.
    """
    attributes = split.attributes[image_id]
    shown = [f"{attributes.color} shape"] if attributes.color else []
    shown += [attributes.shape] if attributes.shape else []
    return [
        VisualQuestion(question=template.format(value), answer=answer, images=(image_id,), kind="yes/no")
        for value in shown
        for template, answer, _ in TEMPLATES
    ]


class PairQuestions:
    """Two-image questions over the pictures of one split whose colour and shape are both known.

    ``draw`` is deterministic in the state of the random generator that it is given.

    Args:
        split: the split to take pictures from.
    """

    KINDS = ("which image", "same shape", "same color", "how many", "what differs", "color of one", "shape of one")

    def __init__(self, split: Split) -> None:
        self.split = split
        self.groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for image_id, attributes in sorted(split.attributes.items()):
            if attributes.color and attributes.shape:
                self.groups[attributes.color, attributes.shape].append(image_id)
        self._makers: dict[str, Callable[[random.Random], tuple[str, str, list[int]]]] = {
            "which image": self._which_image,
            "same shape": lambda rng: self._same(rng, "shape"),
            "same color": lambda rng: self._same(rng, "color"),
            "how many": self._how_many,
            "what differs": self._what_differs,
            "color of one": lambda rng: self._attribute_of_one(rng, "color"),
            "shape of one": lambda rng: self._attribute_of_one(rng, "shape"),
        }

    def draw(self, kind: str, rng: random.Random) -> VisualQuestion:
        """One question of a kind, its answer drawn uniformly.

        Raises:
            ValueError: for an unknown kind.
        """
        if kind not in self._makers:
            raise ValueError(f"expected a kind of two-image question in {self.KINDS}, got {kind!r}")
        question, answer, images = self._makers[kind](rng)
        return VisualQuestion(question=question, answer=answer, images=(images[0], images[1]), kind=kind)

    def draw_many(self, count: int, seed: int) -> list[VisualQuestion]:
        """``count`` questions, the kinds in turn."""
        rng = random.Random(seed)
        return [self.draw(self.KINDS[index % len(self.KINDS)], rng) for index in range(count)]

    def _picture(self, rng: random.Random, fits: Callable[[str, str], bool], exclude: int | None = None) -> int:
        """A picture of a uniformly drawn (colour, shape) that fits."""
        groups = [key for key, group in self.groups.items() if fits(*key) and (len(group) > 1 or group[0] != exclude)]
        group = self.groups[rng.choice(groups)]
        while True:
            image_id = rng.choice(group)
            if image_id != exclude:
                return image_id

    def _show(self, image_id: int) -> tuple[str, str]:
        attributes = self.split.attributes[image_id]
        assert attributes.color is not None and attributes.shape is not None
        return attributes.color, attributes.shape

    def _other(self, rng: random.Random, first: int, same_color: bool, same_shape: bool) -> int:
        """A different picture that agrees with the first one exactly as told."""
        color, shape = self._show(first)
        return self._picture(rng, lambda c, s: (c == color) == same_color and (s == shape) == same_shape, first)

    def _pair(self, rng: random.Random, same_color: bool, same_shape: bool) -> list[int]:
        first = self._picture(rng, lambda c, s: True)
        return [first, self._other(rng, first, same_color, same_shape)]

    def _describe(self, rng: random.Random, image_id: int) -> tuple[str, Callable[[int], bool]]:
        """Words for what a picture shows ("red circle", "circle" or "red shape") and their test."""
        color, shape = self._show(image_id)
        form = rng.randrange(3)
        if form == 0:
            return f"{color} {shape}", lambda other: self._show(other) == (color, shape)
        if form == 1:
            return shape, lambda other: self._show(other)[1] == shape
        return f"{color} shape", lambda other: self._show(other)[0] == color

    def _which_image(self, rng: random.Random) -> tuple[str, str, list[int]]:
        while True:
            target = self._picture(rng, lambda c, s: True)
            words, shows = self._describe(rng, target)
            # Half of the distractors share a property with the target, so that neither alone is enough.
            same_color, same_shape = rng.choice(((True, False), (False, True), (False, False), (False, False)))
            other = self._other(rng, target, same_color, same_shape)
            if not shows(other):
                break
        first = rng.random() < 0.5
        question = rng.choice(("which image shows a {}?", "which image contains a {}?", "which picture shows a {}?"))
        return question.format(words), "first" if first else "second", [target, other] if first else [other, target]

    def _same(self, rng: random.Random, name: str) -> tuple[str, str, list[int]]:
        same, other = rng.random() < 0.5, rng.random() < 0.5
        pair = self._pair(rng, same, other) if name == "color" else self._pair(rng, other, same)
        question = rng.choice(
            (
                f"do both images show the same {name}?",
                f"do the two images show the same {name}?",
                f"is the {name} the same in both images?",
                f"does <|image_1|>\nshow the same {name} as <|image_2|>?",
            )
        )
        return question, "yes" if same else "no", pair

    def _how_many(self, rng: random.Random) -> tuple[str, str, list[int]]:
        wanted = rng.randrange(3)
        while True:
            described = self._picture(rng, lambda c, s: True)
            words, shows = self._describe(rng, described)
            same_color, same_shape = rng.random() < 0.5, rng.random() < 0.5
            if wanted == 0:
                pair = self._pair(rng, same_color, same_shape)
            else:
                pair = [described, self._other(rng, described, same_color, same_shape)]
            if sum(map(shows, pair)) == wanted:
                break
        rng.shuffle(pair)
        question = rng.choice(("how many images show a {}?", "how many of the images contain a {}?"))
        return question.format(words), ("zero", "one", "two")[wanted], pair

    def _what_differs(self, rng: random.Random) -> tuple[str, str, list[int]]:
        answer = rng.choice(("color", "shape", "both", "nothing"))
        pair = self._pair(rng, answer in ("shape", "nothing"), answer in ("color", "nothing"))
        question = rng.choice(
            (
                "what differs between the images?",
                "what differs between the two images, the color or the shape?",
                "what differs between <|image_1|> and <|image_2|>?",
            )
        )
        return question, answer, pair

    def _attribute_of_one(self, rng: random.Random, name: str) -> tuple[str, str, list[int]]:
        wanted = rng.choice(COLORS if name == "color" else SHAPES)
        target = self._picture(rng, lambda c, s: wanted in (c, s))
        other = self._other(rng, target, name != "color" and rng.random() < 0.5, name == "color" and rng.random() < 0.5)
        position = rng.randrange(2)
        place = ("first", "second")[position]
        wording = {
            "color": ("what color is the shape in the {} image?", "what is the color of the shape in the {} image?"),
            "shape": ("what shape is in the {} image?", "what shape does the {} image contain?"),
        }[name]
        pair = [other, target] if position else [target, other]
        return rng.choice(wording).format(place), wanted, pair


def evaluation_questions(num_pairs: int = 2100, seed: int = 20) -> tuple[Split, list[VisualQuestion]]:
    """The demo evaluation: all 9,673 single-image test questions and ``num_pairs`` balanced two-image ones."""
    split = load_split("test")
    return split, [*split.questions, *PairQuestions(split).draw_many(num_pairs, seed)]
