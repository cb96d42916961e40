"""Long-context questions made on the spot, in the manner of RULER (arXiv 2404.06654, sections 3 and B).

A haystack of plain sentences hides needles ("The magic number for amber-falcon is 483920.") or assignments of variables
at a chosen depth, and the question after it asks for them. Everything comes from one seed: no data is needed. Keys and
numbers of a sample differ from each other, so that an answer cannot be right by chance or by a neighbour.

Departures from RULER: the haystack's sentences are put together from word lists instead of taken from essays (a text
may be given), numbers have six digits (RULER: seven), and there are no frequent-word and question-answering tasks.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TASKS = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking")

_ADJECTIVES = "amber brisk calm dusty eager faint golden hollow ivory jolly keen lively mellow noble olive pale quiet"
_ADJECTIVES += " rapid silver tidy upper vivid warm young"
_NOUNS = "anchor bridge candle desert engine falcon garden harbor island jacket kettle ladder market needle orchard"
_NOUNS += " pillar quarry ribbon saddle temple umbrella valley window yard"
_SUBJECTS = (
    "the gardener",
    "a passing sailor",
    "the old clerk",
    "our neighbour",
    "the night train",
    "a grey heron",
    "the schoolmaster",
    "a travelling choir",
    "the village baker",
    "an early visitor",
)
_VERBS = (
    "walked past",
    "wrote about",
    "waited beside",
    "remembered",
    "looked after",
    "drew a map of",
    "came back to",
    "asked about",
    "lived near",
    "told a story about",
)
_OBJECTS = (
    "the stone bridge",
    "a field of barley",
    "the empty station",
    "a row of poplars",
    "the harbour wall",
    "an unlit lamp",
    "the river path",
    "a box of letters",
    "the wooden gate",
    "a distant hill",
)
_TIMES = (
    "before noon",
    "in late autumn",
    "after the rain",
    "on market days",
    "every other week",
    "at first light",
    "when the bells rang",
    "without any hurry",
)

_ASKS = {
    "single": "What is the magic number for {key}? Answer with the number alone.",
    "multi_key": "What is the magic number for {key}? Answer with the number alone.",
    "multi_value": "What are all the magic numbers for {key}? Answer with the numbers alone.",
    "multi_query": "What are the magic numbers for {key}? Answer with the numbers alone, in this order.",
    "variable_tracking": "Which variables hold the value {key}? Answer with the names of the variables alone.",
}
_OPENING = "Read the text below and answer the question after it.\n\n"


@dataclass(frozen=True, kw_only=True)
class NeedleSample:
    """One question.

    Attributes:
        task: one of ``TASKS``.
        length: tokens that were asked for, prompt and template together.
        depth: where the (first) needle that is asked for lies, 0 for the start and 1 for the end.
        index: number of the sample among those of its task, length and depth.
        prompt: haystack and question.
        expected: strings that the answer must hold.
        num_tokens: tokens of the whole prompt, at most ``length``.
    """

    task: str
    length: int
    depth: float
    index: int
    prompt: str
    expected: tuple[str, ...]
    num_tokens: int

    def score(self, answer: str) -> float:
        """Share of the expected strings that the answer holds (RULER's recall)."""
        return sum(one in answer for one in self.expected) / len(self.expected)


def make_sample(
    task: str,
    length: int,
    depth: float,
    index: int,
    count_tokens: Callable[[str], int],
    *,
    seed: int = 0,
    num_needles: int = 4,
    haystack: Sequence[str] | None = None,
) -> NeedleSample:
    """A question whose prompt fills a length to within a sentence.

    Args:
        task: one of ``TASKS``.
        length: most tokens.
        depth: between 0 and 1.
        index: number of the sample.
        count_tokens: tokens of a whole prompt, the chat's included.
        seed: of everything drawn.
        num_needles: needles of the tasks with several, or assignments of a chain.
        haystack: sentences to use, from the first on, over and over; None for made-up ones.

    Raises:
        ValueError: for values out of range, or a length that cannot hold needles and question.
    """
    problems = []
    if task not in TASKS:
        problems.append(f"task must be one of {TASKS}, got {task!r}")
    if not 0 <= depth <= 1:
        problems.append(f"depth must lie between 0 and 1, got {depth}")
    if num_needles < 2:
        problems.append(f"num_needles must be at least 2, got {num_needles}")
    if haystack is not None and not haystack:
        problems.append("the haystack holds no sentence")
    if problems:
        raise ValueError("; ".join(problems))
    draw = random.Random(f"{seed} {task} {length} {depth} {index}")
    needles, key, expected, first_asked = _needles(task, num_needles, draw)
    question = "\n\n" + _ASKS[task].format(key=key)
    sentences = _Sentences(draw, haystack)
    bare = count_tokens(_OPENING + " ".join(needles) + question)
    if bare > length:
        raise ValueError(f"a length of {length} tokens is too short for {task!r}: needles and question take {bare}")
    found: tuple[str, int] = (_OPENING + " ".join(needles) + question, bare)
    # Tokens of sentences put together differ a little from their sum: the number of sentences is searched for.
    low, high = 0, max(1, (length - bare) // 4)
    while low < high:
        number = (low + high + 1) // 2
        text = _OPENING + " ".join(_placed(sentences.take(number), needles, first_asked, depth, draw)) + question
        counted = count_tokens(text)
        if counted <= length:
            low, found = number, (text, counted)
        else:
            high = number - 1
    return NeedleSample(
        task=task, length=length, depth=depth, index=index, prompt=found[0], expected=expected, num_tokens=found[1]
    )


def _needles(task: str, count: int, draw: random.Random) -> tuple[list[str], str, tuple[str, ...], int]:
    """Needles in the order of the text, what the question names, what it expects, which needle stands at the depth."""
    if task == "variable_tracking":
        return _chain(count, draw)
    numbers = [str(number) for number in draw.sample(range(100_000, 1_000_000), count)]
    pairs = [f"{one}-{two}" for one in _ADJECTIVES.split() for two in _NOUNS.split()]
    keys = draw.sample(pairs, count)
    if task == "single":
        keys, numbers = keys[:1], numbers[:1]
    elif task == "multi_value":
        keys = keys[:1] * count
    texts = [f"The magic number for {key} is {number}." for key, number in zip(keys, numbers, strict=True)]
    if task == "multi_query":
        return texts, ", ".join(keys[:-1]) + f" and {keys[-1]}", tuple(numbers), 0
    if task == "multi_value":
        return texts, keys[0], tuple(numbers), 0
    asked = draw.randrange(len(keys))
    return texts, keys[asked], (numbers[asked],), asked


def _chain(count: int, draw: random.Random) -> tuple[list[str], str, tuple[str, ...], int]:
    """A chain of assignments that ends in the question, and one of the same length beside it."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 2 * count:
        name = "".join(draw.choice(letters) for _ in range(5))
        if name not in names:
            names.append(name)
    values = [str(value) for value in draw.sample(range(10_000, 100_000), 2)]
    chains = []
    for value, chosen in zip(values, (names[:count], names[count:]), strict=True):
        lines = [f"VAR {chosen[0]} = {value}."]
        lines += [f"VAR {after} = VAR {before}." for before, after in zip(chosen[:-1], chosen[1:], strict=True)]
        chains.append(lines)
    mixed: list[str] = []
    left = [list(chain) for chain in chains]
    while any(left):
        mixed.append(draw.choice([chain for chain in left if chain]).pop(0))
    return mixed, values[0], tuple(names[:count]), mixed.index(chains[0][0])


def _placed(sentences: list[str], needles: list[str], asked: int, depth: float, draw: random.Random) -> list[str]:
    """The needles among the sentences: the asked one at the depth, the others anywhere in their order around it."""
    generator = random.Random(draw.getstate()[1][0])  # the same places for every number of sentences that is tried
    middle = round(depth * len(sentences))
    places = sorted(generator.uniform(0, middle) for _ in range(asked))
    places += [middle] + sorted(generator.uniform(middle, len(sentences)) for _ in needles[asked + 1 :])
    text: list[str] = []
    start = 0
    for place, needle in zip(places, needles, strict=True):
        text += [*sentences[start : round(place)], needle]
        start = round(place)
    return text + sentences[start:]


class _Sentences:
    """An endless haystack, of which any beginning may be taken."""

    def __init__(self, draw: random.Random, given: Sequence[str] | None) -> None:
        self._draw = random.Random(draw.random())
        self._given = given
        self._made: list[str] = []

    def take(self, count: int) -> list[str]:
        """The first sentences."""
        while len(self._made) < count:
            self._made.append(self._next())
        return self._made[:count]

    def _next(self) -> str:
        if self._given is not None:
            return self._given[len(self._made) % len(self._given)]
        words = [self._draw.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)]
        text = " ".join(words)
        return text[0].upper() + text[1:] + "."
