"""The turns of a chat: texts of each prompt alone, and what was read before is not read again."""

import functools

import pytest
import torch
from PIL import Image

import phi35
from phi35 import api
from phi35.api import SMALL_MODEL
from phi35.cli.chat import Conversation
from phi35.generation import growing_prompts
from phi35.generation.growing_prompts import GrowingPrompts
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer


@functools.cache
def pair() -> tuple[object, Processor]:
    """A tiny vision model that crosses at 300 tokens."""
    model = phi35.create("tiny-phi-3.5-vision", seed=2, initializer_range=0.3, original_max_position_embeddings=300)
    return model, Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)


def test_a_conversation_over_the_switch_reads_each_turn_once(tmp_path: object) -> None:
    """Five turns, a picture in the second, which pass 300 tokens; answers are those of ``phi35.generate``."""
    model, processor = pair()
    path = tmp_path / "red.png"  # type: ignore[operator]
    Image.new("RGB", (64, 64), "red").save(path)
    conversation = Conversation((model, processor), max_new_tokens=24)
    messages, images, lengths = [], [], []
    for number, question in enumerate(["what is this? " * 6, "a picture", "and now? " * 8, "which one? " * 12, "so?"]):
        if number == 1:
            conversation.take(f"/image {path}")
            images.append(path)
        tag = "<|image_1|>\n" if number == 1 else ""
        messages.append({"role": "user", "content": tag + question})
        expected = phi35.generate(messages=messages, images=images or None, model=pair(), max_new_tokens=24)
        assert "".join(conversation.take(question)) == expected
        text, _ = api.chat_text(processor, messages, images or None, None)
        lengths.append(processor(text, images=images or None)["input_ids"].shape[1])
        messages.append({"role": "assistant", "content": expected})
    assert lengths[0] < 300 < lengths[-1], "the conversation must pass the switch"
    statistics = conversation.reader.batcher.prefix_statistics
    assert statistics.hit_tokens > 0.25 * statistics.prompt_tokens


def test_a_longer_prompt_gets_a_larger_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_prompts, "FIRST_TOKENS", 64)
    model, processor = pair()
    reader = GrowingPrompts(model, processor)
    for count in (5, 60, 400):
        batch = processor("what is this? " * count)
        options = {"max_new_tokens": 8, "stop_token_ids": ()}
        found = "".join(reader.answer(batch, **options))
        ids = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]  # type: ignore[attr-defined]
        assert found == processor.decode(ids)


def test_a_reader_may_leave_in_the_middle() -> None:
    model, processor = pair()
    reader, batch = GrowingPrompts(model, processor), processor("what is this? " * 30)
    options = {"max_new_tokens": 30, "stop_token_ids": ()}
    whole = "".join(reader.answer(batch, **options))
    stream = reader.answer(batch, **options)
    first = next(stream)
    stream.close()
    assert whole.startswith(first) and reader.batcher is not None and reader.batcher.idle
    assert "".join(reader.answer(batch, **options)) == whole
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    assert "".join(reader.answer(batch, stop=[middle], **options)) == whole[: whole.index(middle)]


def test_bad_options_are_named_and_leave_the_conversation_as_it_was() -> None:
    conversation = Conversation(pair(), max_new_tokens=4, temperature=-1)
    with pytest.raises(ValueError, match="temperature"):
        "".join(conversation.take("Hi"))
    assert conversation.messages == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        "".join(GrowingPrompts(*pair()).answer({"input_ids": torch.tensor([[5]])}, max_new_tokens="4"))
