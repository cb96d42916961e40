"""The tokens of a ``tokenizer.json`` as llama.cpp's sentencepiece-like tokenizer takes them.

That tokenizer joins the neighbours whose joint text is the token of the highest score, whichever two they are;
``tokenizer.json`` lists the pairs that may be joined, in order. Scores that fall with the rank of a token's first pair
give equal ids wherever every pair of tokens whose text is a token stands in the list, and the pairs of a token stand
together, as in the published files.
"""

from dataclasses import dataclass
from json import loads
from typing import Any

from phi35.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""

NEVER_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens after which llama.cpp keeps white space in a model whose name has "phi-3" in it."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, filled up to the model's table.

    Attributes:
        tokens: texts.
        scores: the higher, the earlier joined.
        types: GGUF's token types.
        strips: whether white space after special tokens is dropped; llama.cpp knows that by the model's name.
        notes: where llama.cpp's ids will differ.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    strips: bool
    notes: tuple[str, ...]


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Tokens of a tokenizer for a table of ``size`` rows.

    Raises:
        ValueError: if it is not of the kind that llama.cpp's tokenizer stands for, or has ids past the table.
    """
    fields = loads(tokenizer.definition)
    model = fields["model"]
    problems = [
        f"{name} is {found!r}, expected {wanted!r}"
        for name, found, wanted in (
            ("model.type", model.get("type"), "BPE"),
            ("model.byte_fallback", bool(model.get("byte_fallback")), True),
            ("pre_tokenizer", fields.get("pre_tokenizer"), None),
            ("normalizer", _normalizes(fields.get("normalizer")), ["Prepend ▁", "Replace ' ' ▁"]),
        )
        if found != wanted
    ]
    if problems:
        raise ValueError("llama.cpp's sentencepiece tokenizer cannot stand for tokenizer.json: " + "; ".join(problems))
    tokens, scores = [f"[PAD{index}]" for index in range(size)], [-1e4] * size
    types = [UNUSED] * size
    added = fields["added_tokens"]
    highest = max(max(model["vocab"].values()), *(token["id"] for token in added))
    if highest >= size:
        raise ValueError(f"the tokenizer has the id {highest}, and the model's table ends at {size - 1}")
    ranks, notes = _ranks(model)
    lowest = -float(len(ranks))
    for text, index in model["vocab"].items():
        tokens[index], types[index] = text, NORMAL
        scores[index] = -float(ranks[text]) if text in ranks else lowest - 1.0
        if len(text) == 6 and text.startswith("<0x"):
            types[index], scores[index] = BYTE, 0.0
    for token in added:
        tokens[token["id"]], scores[token["id"]] = token["content"], -1000.0
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if model.get("unk_token") in model["vocab"]:
        unknown = model["vocab"][model["unk_token"]]
        types[unknown], scores[unknown] = UNKNOWN, 0.0
    strips, more = _strips(added)
    return Vocabulary(tokens, scores, types, strips, (*notes, *more))


def _normalizes(normalizer: dict[str, Any] | None) -> list[str]:
    """A normalizer in words."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    words = []
    for step in steps:
        if step["type"] == "Prepend":
            words.append(f"Prepend {step['prepend']}")
        elif step["type"] == "Replace":
            words.append(f"Replace {step['pattern'].get('String')!r} {step['content']}")
        else:
            words.append(step["type"])
    return words


def _ranks(model: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Rank of each token among those that pairs make, and in what the scores are not equal to the list of pairs."""
    vocab = model["vocab"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    scattered, last = 0, None
    for first, second in pairs:
        made = first + second
        scattered += made in ranks and made != last
        ranks.setdefault(made, len(ranks))
        last = made
    listed = set(pairs)
    more = sum(
        (text[:cut], text[cut:]) not in listed
        for text in vocab
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    )
    notes = []
    if more or scattered:
        notes.append(
            f"llama.cpp may cut some texts otherwise: it joins {more:,} pairs of tokens that tokenizer.json does not "
            f"list, and ranks {scattered:,} by another pair of the same token"
        )
    return ranks, notes


def _strips(added: list[dict[str, Any]]) -> tuple[bool, list[str]]:
    """Whether most special tokens drop white space after them, and which ones do not do as the most."""
    flags = {
        token["content"]: bool(token["rstrip"]) for token in added if token["content"] not in (*NEVER_STRIPPED, "</s>")
    }
    chat = {text: flag for text, flag in flags.items() if not text.startswith("<|placeholder")}
    strips = 2 * sum(chat.values()) > len(chat)
    others = sorted(text for text, flag in chat.items() if flag != strips)
    if not others:
        return strips, []
    does = "keeps" if not strips else "drops"
    return strips, [f"llama.cpp {does} white space after {', '.join(others)}, and this tokenizer does not"]
