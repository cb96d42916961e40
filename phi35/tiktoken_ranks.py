"""phi-3-small's vocabulary: tiktoken's cl100k_base ranks, turned into a ``tokenizer.json``.

tiktoken merges, at every step, the adjacent pair whose union has the lowest rank. The same order as a list of
merges: for every token by rank, each way to split it into two tokens. Its published folder holds no such list, so
it is made here once at load (about a second).
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from phi35.byte_level import byte_of_character

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How cl100k_base cuts text before merging."""


PUBLISHED_RANKS = 100256
_NAMED = {
    100257: "endoftext",
    100258: "fim_prefix",
    100259: "fim_middle",
    100260: "fim_suffix",
    100261: "system",
    100262: "user",
    100263: "assistant",
    100266: "end",
    100276: "endofprompt",
}
_FILLED_FIRST = (100264, 100265, 100256)


def published_special_tokens() -> dict[int, str]:
    """Id -> text of phi-3-small's special tokens, which its published folder holds in code alone.

    Nine have a name; all other ids up to 100,351 are numbered dummies, numbered in the published order.
    """
    dummies = [*_FILLED_FIRST, *(index for index in range(100267, 100352) if index not in _NAMED)]
    tokens = {index: f"<|{name}|>" for index, name in _NAMED.items()}
    return tokens | {index: f"<|dummy_id_{number}|>" for number, index in enumerate(dummies)}


def definition_from_folder(folder: Path, settings: dict[str, Any]) -> str:
    """The text of a tokenizer.json equal to a folder's ``*.tiktoken`` file.

    Special tokens come from ``tokenizer_module.json`` and from ``added_tokens_decoder`` of the settings; what they
    leave out of phi-3-small's, whose published folder has them in code alone, is known here.

    Raises:
        ValueError: if the folder has no such file, or its ids leave gaps.
    """
    files = sorted(folder.glob("*.tiktoken"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds no tokenizer.json and {len(files)} *.tiktoken files; expected one of them")
    ranks = _read_ranks(files[0])
    special = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    module_path = folder / "tokenizer_module.json"
    if module_path.is_file():
        for token in json.loads(module_path.read_text("utf-8")).get("added_tokens", []):
            special.setdefault(token["id"], token)
    if len(ranks) == PUBLISHED_RANKS:
        for index, content in published_special_tokens().items():
            special.setdefault(index, {"content": content, **_FLAGS})
    expected = list(range(len(ranks), len(ranks) + len(special)))
    if sorted(special) != expected:
        missing = sorted(set(expected) - set(special))
        raise ValueError(
            f"{folder}: special token ids must follow the {len(ranks)} ranks without gaps; missing {missing}"
        )
    return json.dumps(_definition(ranks, special), ensure_ascii=False)


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_text("ascii").splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}:{number}: expected a base64 token and its rank, got {line[:60]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once")
    return ranks


def _definition(ranks: dict[bytes, int], special: dict[int, dict[str, Any]]) -> dict[str, Any]:
    character = {byte: text for text, byte in byte_of_character().items()}
    text = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[text[left], text[right]] for left, right in known]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": special[index]["content"]} | {flag: special[index][flag] for flag in _FLAGS}
            for index in sorted(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
