"""A phi-3-small folder as published: ranks in a tiktoken file, special tokens in code that is never run."""

import json
import warnings

import pytest
from published import published_file

from phi35.config_io import SMALL_DUMMY_IDS
from phi35.loading import load_processor
from phi35.presets import get
from phi35.tiktoken_ranks import published_special_tokens


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """Of the ranks and a tokenizer_config.json without tokens, as the published repository has them."""
    folder = tmp_path_factory.mktemp("small")
    ranks = published_file("tokenizers/phi-3-small/cl100k_base.tiktoken")
    (folder / ranks.name).write_bytes(ranks.read_bytes())
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_processor(folder, get("phi-3-small-8k"))


def test_special_tokens_are_known_without_the_published_code(processor):
    listed = json.loads(published_file("tokenizers/phi-3-small/tokenizer_config.json").read_text())
    expected = {int(index): token["content"] for index, token in listed["added_tokens_decoder"].items()}
    assert published_special_tokens() == expected
    assert processor.tokenizer.special_ids == {token: index for index, token in expected.items()}
    assert processor.tokenizer.vocab_size == 100352


def test_the_ids_that_are_never_written_are_the_dummies_and_the_unused_tokens():
    names = published_special_tokens()
    unused = {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endofprompt|>"}
    expected = sorted(index for index, name in names.items() if "dummy_id" in name or name in unused)
    assert list(SMALL_DUMMY_IDS) == expected and len(expected) == 91
    assert get("phi-3-small-8k").dummy_token_indices == SMALL_DUMMY_IDS


def test_a_folder_without_tokenizer_json_gives_a_processor_and_an_export(processor, tmp_path):
    batch = processor("<|user|>\nHi<|end|>\n<|assistant|>\n<|dummy_id_11|>")
    assert batch["input_ids"].tolist() == [[100262, 198, 13347, 100266, 198, 100263, 198, 100275]]
    processor.save(tmp_path)
    exported = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert exported == json.loads(processor.tokenizer.definition)
