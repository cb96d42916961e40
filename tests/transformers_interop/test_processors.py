"""``AutoProcessor``: the ids, pixels and texts of this package's processor, in the form other libraries expect."""

from pathlib import Path

import numpy as np
import pytest
import torch
from published import published_file
from transformers import AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin

import phi35
from phi35.tokenizer import Tokenizer

SMALL = Path(phi35.__file__).parent / "small_model"
TEXTS = ["Hi", "<|user|>\nHi<|end|>\n<|assistant|>\n", "  two  spaces", "é😀\n\n", "<s>Hi", "a<|end|> b"]


def pictures(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((64, 64), (50, 100))]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(SMALL)


@pytest.fixture(scope="module")
def ours():
    return phi35.load(SMALL, device="cpu")[1]


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-vision"])
def test_published_tokenizers_give_the_published_ids(name: str) -> None:
    from phi35.interop.tokenization import FamilyTokenizer

    folder = published_file(f"tokenizers/{name}")
    ours, theirs = Tokenizer.from_folder(folder), FamilyTokenizer.from_pretrained(folder)
    texts = published_file("tokenizers/golden_texts.txt").read_text("utf-8").split("\n__ggml_vocab_test__\n") + TEXTS
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_special_tokens=False)
    assert theirs(["a", "a b c d"], padding=True)["attention_mask"][0][0] == 0  # on the left
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_token_id, ours.eos_token_id)


def test_a_text_model_gets_its_tokenizer(tmp_path: Path, ours) -> None:
    text_only = phi35.create("tiny-phi-3.5-mini", seed=1)
    phi35.save(text_only, phi35.processor.Processor(ours.tokenizer, text_only.config), tmp_path)
    tokenizer = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    chat = [{"role": "user", "content": "What is it?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == ours.apply_chat_template(chat)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == ours.tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "What is it?"
    tokenizer.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "more")
    assert Tokenizer.from_folder(tmp_path / "more").encode("<extra>", add_special_tokens=False) == [len(tokenizer) - 1]


def test_texts_and_pictures_equal_ours(processor, ours) -> None:
    assert isinstance(processor, ProcessorMixin)
    images = pictures()
    texts = ["<|user|>\n<|image_1|>\nand <|image_2|> differ?", "no picture", "untagged"]
    nested = [images, [], images[1:]]
    theirs = processor(images=nested, text=texts, padding=True, return_tensors="pt")
    expected = ours(texts, images=nested)
    ids = expected["input_ids"]
    assert torch.equal(theirs["input_ids"], ids.masked_fill(ids < 0, 1044))
    assert torch.equal(theirs["attention_mask"], expected["attention_mask"])
    assert torch.equal(theirs["image_sizes"], expected["image_sizes"])
    counts = 1 + (theirs["image_sizes"] // 64).prod(dim=1)
    real = torch.cat([image[:count] for image, count in zip(theirs["pixel_values"], counts, strict=True)])
    assert torch.equal(real, expected["pixel_values"])


def test_tags_in_another_order_put_the_pictures_in_that_order(processor, ours) -> None:
    images, text = pictures(), "<|image_2|> before <|image_1|>, again <|image_2|>"
    theirs = processor(images=images, text=text, return_tensors="pt", padding=True)
    assert theirs["image_sizes"].tolist() == [[64, 64], [64, 64], [64, 64]]
    assert torch.equal(theirs["pixel_values"][0], theirs["pixel_values"][2])
    assert not torch.equal(theirs["pixel_values"][0], theirs["pixel_values"][1])
    assert torch.equal(theirs["input_ids"] == 1044, ours(text, images=images)["input_ids"] < 0)


def test_chats_become_inputs_as_ours_do(processor, ours) -> None:
    images = pictures()
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Which is red?"}]
    chat = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<s>" + ours.apply_chat_template(chat)
    batch = processor.apply_chat_template(
        [chat, [{"role": "user", "content": "none"}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    texts = [ours.apply_chat_template(chat), ours.apply_chat_template([{"role": "user", "content": "none"}])]
    expected = ours(texts, images=[images, []])["input_ids"]
    assert torch.equal(batch["input_ids"], expected.masked_fill(expected < 0, 1044))
    # the text of a template is not given a second BOS
    assert processor(text=text, images=images)["input_ids"][0].count(1) == 3
    unfinished = processor.apply_chat_template(
        [*chat, {"role": "assistant", "content": "The first"}], continue_final_message=True
    )
    assert unfinished.endswith("<|assistant|>\nThe first")


def test_prompt_and_completion_join_to_the_chats_ids(processor) -> None:
    chat = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It"}]
    whole, prompt = (
        processor.apply_chat_template(chat),
        processor.apply_chat_template(chat[:1], add_generation_prompt=True),
    )
    ids = [
        processor(text=text, add_special_tokens=False)["input_ids"][0] for text in (prompt, whole[len(prompt) :], whole)
    ]
    assert ids[0] + ids[1] == ids[2] and ids[0][0] == 1 and ids[1][0] != 1


def test_saving_and_decoding(processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SMALL / path.name).read_bytes(), path.name
    ids = processor(text=["one", "two words"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["one", "two words"]


def test_mistakes_are_named(processor) -> None:
    with pytest.raises(ValueError, match="no videos"):
        processor(text="a", videos=[1])
    with pytest.raises(ValueError, match="take 2 lists"):
        processor(text=["a", "b"], images=[pictures()])
    with pytest.raises(ValueError, match="cannot be cut"):
        processor(text="<|image_1|> what", images=pictures()[:1], truncation=True, max_length=8)
    with pytest.raises(ValueError, match="not supported"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="no <|image_2|>"):
        processor(text="<|image_1|> what", images=pictures())
