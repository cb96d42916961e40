"""Each published tokenizer folder: its own ids, its own template, and what an export of it gives.

Golden rows: texts and ids of llama.cpp's phi-3 vocabulary test, as published beside the tokenizer files.
"""

import functools
import json
from pathlib import Path

import pytest
import tokenizers
from published import published_file

from phi35.chat_template import FAMILY_TEMPLATE
from phi35.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie groß ist  der Mond? 🌝\n"},
    {"role": "assistant", "content": "3474 km."},
    {"role": "user", "content": "Hi"},
]


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_folder(published_file(f"tokenizers/{name}"))


def golden_rows() -> list[tuple[str, list[int]]]:
    """The separator owns the line feeds before and after it; the last row is empty."""
    texts = published_file("tokenizers/golden_texts.txt").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = published_file("tokenizers/golden_ids.txt").read_text("utf-8").split("\n")
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]


def test_all_golden_rows_of_phi_3_mini() -> None:
    rows = golden_rows()
    assert len(rows) == 47
    for text, ids in rows:
        assert tokenizer("phi-3-mini").encode(text) == ids, text
        assert tokenizer("phi-3-mini").decode(ids) == text


def test_text_after_a_role_token_as_published() -> None:
    """The mini's role tokens swallow the line feed; the vision file's keep it and put a BOS in front."""
    assert tokenizer("phi-3-mini").encode("<|user|>\nHi") == [32010, 6324]
    assert tokenizer("phi-3.5-vision").encode("<|user|>\n") == [1, 32010, 29871, 13]


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-vision"])
def test_chats_give_what_the_raw_file_gives(name: str) -> None:
    raw = tokenizers.Tokenizer.from_file(str(published_file(f"tokenizers/{name}/tokenizer.json")))
    text = tokenizer(name).apply_chat_template(CHAT)
    expected = "".join(f"<|{turn['role']}|>\n{turn['content']}<|end|>\n" for turn in CHAT) + "<|assistant|>\n"
    assert text == expected
    assert tokenizer(name).encode(text) == raw.encode(text).ids
    ids = tokenizer(name).encode(text)
    assert tokenizer(name).decode(ids, skip_special=False) == raw.decode(ids, skip_special_tokens=False)
    assert tokenizer(name).decode(ids) == raw.decode(ids)


def test_each_folders_own_template_wins() -> None:
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    mini, vision = tokenizer("phi-3-mini"), tokenizer("phi-3.5-vision")
    assert mini.apply_chat_template(turns) == "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert mini.apply_chat_template(turns[1:], add_generation_prompt=False) == "<|user|>\nHi<|end|>\n<|endoftext|>"
    assert vision.apply_chat_template(turns[1:], add_generation_prompt=False) == "<|user|>\nHi<|end|>\n"
    reply = [*turns[1:], {"role": "assistant", "content": "Hello"}]
    assert vision.apply_chat_template(reply) == "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    small = tokenizer("phi-3-small").apply_chat_template(turns[1:])
    assert small.startswith("<|endoftext|><|start_header_id|>user<|end_header_id|>\n\nHi")


def test_the_family_template_leaves_out_an_empty_system_turn(tmp_path: Path) -> None:
    """A folder without a template gets phi-3.5-mini's."""
    source = published_file("tokenizers/phi-3-mini")
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    read = Tokenizer.from_folder(tmp_path)
    assert read.chat_template == FAMILY_TEMPLATE
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert read.apply_chat_template(turns) == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert read.apply_chat_template(turns, add_generation_prompt=False) == "<|user|>\nHi<|end|>\n<|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", "utf-8")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(turns[1:]) == "<s>Hi"


def test_special_ids_and_bos() -> None:
    mini, vision, small = (tokenizer(name) for name in ("phi-3-mini", "phi-3.5-vision", "phi-3-small"))
    for name, token_id in {
        "endoftext": 32000,
        "assistant": 32001,
        "system": 32006,
        "end": 32007,
        "user": 32010,
    }.items():
        assert mini.special_ids[f"<|{name}|>"] == vision.special_ids[f"<|{name}|>"] == token_id
    assert vision.special_ids["<|image|>"] == 32044
    for name, token_id in {"endoftext": 100257, "assistant": 100263, "system": 100261, "end": 100266}.items():
        assert small.special_ids[f"<|{name}|>"] == token_id
    assert (mini.add_bos, vision.add_bos, small.add_bos) == (False, True, False)
    assert (mini.bos_token_id, mini.eos_token_id, mini.pad_token_id) == (1, 32000, 32000)
    assert (small.bos_token_id, small.eos_token_id, small.pad_token_id) == (100257, 100257, 100257)
    assert (mini.vocab_size, vision.vocab_size, small.vocab_size) == (32011, 32045, 100352)


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-vision", "phi-3-small"])
def test_an_export_reads_back_and_gives_the_same_ids_in_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = tokenizer(name)
    ours.save(tmp_path)
    if name != "phi-3-small":
        source = published_file(f"tokenizers/{name}/tokenizer.json").read_bytes()
        assert (tmp_path / "tokenizer.json").read_bytes() == source
    again = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    texts = [text for text, _ in golden_rows()] + ["<|user|>\nHi<|end|>\n<|assistant|>\n", "<|system|> x <|end|>y"]
    for text in texts:
        assert again.encode(text) == ours.encode(text) == theirs(text).input_ids, text
    assert again.apply_chat_template(CHAT) == ours.apply_chat_template(CHAT)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == ours.apply_chat_template(
        CHAT
    )
    assert (theirs.pad_token_id or theirs.eos_token_id) == ours.pad_token_id


def test_a_sentencepiece_file_is_kept_for_other_programs_and_read_by_none(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer("phi-3-mini").save(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"no sentencepiece model")
    ours = Tokenizer.from_folder(tmp_path / "source")
    ours.save(tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == b"no sentencepiece model"
    text = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    assert theirs(text).input_ids == ours.encode(text)
    tokenizer("phi-3.5-vision").save(tmp_path / "export")
    assert not (tmp_path / "export" / "tokenizer.model").exists()


PHI_3_SMALL_IDS = {
    "Hello, world!  \n\n  We'VE 1234567 naïve 北京 😀\t<|user|>\nHi<|end|>": (
        "9906 11 1917 0 19124 220 1226 6 4592 220 4513 10961 22 95980 588 95405 245 47653 91416 197 "
        "100262 198 13347 100266"
    ),
    "def f(x):\n    return x**2  # ok\r\n": "755 282 2120 997 262 471 865 334 17 220 674 5509 319",
    "aaaaaaaaaaaaaaaaa   zzzz ____----====": "70540 70540 64 256 1167 10616 89 31843 381 608",
    "ᓚᘏᗢ ķ \u0301e": "157 241 248 157 246 237 157 245 95 10044 115 220 54939 68",
}


def test_phi_3_smalls_ranks_give_tiktokens_ids() -> None:
    """Ids made with tiktoken 0.14.0: ``Encoding`` of the folder's ranks and special ids with cl100k_base's pattern,
    ``encode(text, allowed_special="all")``. 20,000 random texts agreed as well when this was written."""
    for text, ids in PHI_3_SMALL_IDS.items():
        assert tokenizer("phi-3-small").encode(text) == [int(word) for word in ids.split()]
        assert tokenizer("phi-3-small").decode(map(int, ids.split()), skip_special=False) == text
