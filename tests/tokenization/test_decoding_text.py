"""Decoding, broken tokenizer folders and chat messages, with the tokenizer inside the package."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from phi35.api import SMALL_MODEL
from phi35.chat_template import flatten_messages, render
from phi35.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.from_folder(SMALL_MODEL)


def test_decoding_is_the_librarys_for_valid_text(small: Tokenizer) -> None:
    raw = tokenizers.Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    texts = ["", " ", "   x", "a red circle", "naïve 北京 😀\n\tdone", "<|user|>\nHi <|end|>", "▁ under"]
    for text in texts:
        ids = small.encode(text)
        assert ids == raw.encode(text).ids
        assert small.decode(ids) == raw.decode(ids)
        assert small.decode(ids, skip_special=False) == raw.decode(ids, skip_special_tokens=False)
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.choice([*range(259, 1045)]) for _ in range(12)]
        assert small.decode(ids) == raw.decode(ids)


def test_invalid_bytes_spoil_no_others(small: Tokenizer) -> None:
    """The bytes of an emoji, then one that cannot follow: the library would replace all five."""
    ids = [3 + byte for byte in "😀".encode()] + [3 + 0xFF]
    assert small.decode(ids) == "😀\ufffd"


def test_placeholders_and_unknown_ids_have_no_text(small: Tokenizer) -> None:
    ids = small.encode("red", add_special_tokens=False)
    assert small.decode([-1, -1, *ids, 1087, small.special_ids["<|end|>"]]) == "red"


def test_config_decides_over_bos_and_eos(small: Tokenizer) -> None:
    plain = small.encode("red", add_special_tokens=False)
    for bos in (False, True):
        for eos in (False, True):
            settings = {**small.settings, "add_bos_token": bos, "add_eos_token": eos}
            ids = Tokenizer(small.definition, settings).encode("red")
            assert ids == [1] * bos + plain + [small.eos_token_id] * eos


def test_broken_folders_are_named(small: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    other = json.loads(small.definition) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other), "utf-8")
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[", "utf-8")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_a_rank_file_with_gaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_text("YQ== 0\nYg== 1\n", "ascii")
    special = {"content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config = {"added_tokens_decoder": {"3": special | {"special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=r"missing \[2\]"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "x.tiktoken").write_text("YQ== 0\nnonsense\n", "ascii")
    with pytest.raises(ValueError, match="x.tiktoken:2"):
        Tokenizer.from_folder(tmp_path)


def test_templates_run_in_a_sandbox_like_transformers() -> None:
    turns = [{"role": "user", "content": "Hi"}]
    source = "{% for turn in messages %}\n  {% if true %}\n{{ turn | tojson }}\n  {% endif %}\n{% endfor %}\n"
    assert render(source, turns, True) == '{"role": "user", "content": "Hi"}\n'
    with pytest.raises(ValueError, match="no system please"):
        render("{{ raise_exception('no system please') }}", turns, True)
    with pytest.raises(ValueError, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}", turns, True)
    with pytest.raises(ValueError, match="cannot render"):
        render("{% if %}", turns, True)


def test_parts_become_text_and_numbered_tags() -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "And this?"}]},
    ]
    flat, images = flatten_messages(turns)
    assert [turn["content"] for turn in flat] == ["<|image_1|>\nWhat?", "A circle.", "<|image_2|>\nAnd this?"]
    assert images == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        ([{"role": "user"}], r"messages\[0\]"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "user", "content": 3}], "int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "audio"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": "a"}]}], "1 of 2"),
    ],
)
def test_malformed_messages_are_named(messages: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten_messages(messages)  # type: ignore[arg-type]
