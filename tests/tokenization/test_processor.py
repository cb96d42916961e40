"""Prompts with pictures: ids in the published form, batches, tags, and mistakes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from published import published_file

from phi35 import presets
from phi35.api import SMALL_MODEL
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer

SQUARE, WIDE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (128, 64), "blue")


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(SMALL_MODEL, presets.get("tiny-phi-3.5-vision"))


@pytest.fixture(scope="module")
def text_processor() -> Processor:
    return Processor(Tokenizer.from_folder(SMALL_MODEL), presets.get("tiny-phi-3.5-mini"))


def tokens(height: int, width: int, tile: int, merged: int) -> int:
    """Positions of a picture after padding: the formula of the published processor."""
    rows, columns = height // tile, width // tile
    return (rows * columns + 1) * merged**2 + 1 + (rows + 1) * merged


def test_a_prompt_with_two_pictures_gives_the_published_ids() -> None:
    """Worked by hand from the published processor: every chunk between tags is tokenized with its own BOS.

    640x480 under 4 crops is padded to 672x672 (2x2 tiles, 757 positions), 480x640 alike.
    """
    folder = published_file("tokenizers/phi-3.5-vision")
    vision = Processor.from_folder(folder, presets.get("phi-3.5-vision"))
    prompt = "<|user|>\n<|image_1|>\n<|image_2|>\nHi<|end|>\n<|assistant|>\n"
    batch = vision(prompt, images=[Image.new("RGB", (640, 480)), Image.new("RGB", (480, 640))])
    line_feed = [1, 29871, 13]
    last = vision.tokenizer.backend.encode("\nHi<|end|>\n<|assistant|>\n").ids
    assert last[:3] == line_feed and last[-1] == 32001 and 32007 in last
    expected = [1, 32010, *line_feed[1:], *[-1] * 757, *line_feed, *[-2] * 757, *last]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[1] * len(expected)]
    assert batch["image_sizes"].tolist() == [[672, 672], [672, 672]]
    assert batch["pixel_values"].shape == (10, 3, 336, 336)


def test_sixteen_crops_as_published() -> None:
    """The counts of the published processor for 640x480 and 480x640 at num_crops 16."""
    folder = published_file("tokenizers/phi-3.5-vision")
    vision = Processor.from_folder(folder, presets.get("phi-3.5-vision"))
    for size, count in (((640, 480), 1921), ((480, 640), 1933)):
        ids = vision("<|image_1|>", images=[Image.new("RGB", size)], num_crops=16)["input_ids"][0].tolist()
        assert ids == [1, *[-1] * count, 1]


def test_a_batch_pads_on_the_left_and_keeps_images_row_after_row(processor: Processor) -> None:
    prompts = ["<|user|>\nHi<|end|>\n", "<|image_2|> and <|image_1|>", "no picture"]
    batch = processor(prompts, images=[[SQUARE], [SQUARE, WIDE], []], num_crops=[1, [1, 4], 2])
    alone = [
        processor(prompts[0], images=[SQUARE], num_crops=1),
        processor(prompts[1], images=[SQUARE, WIDE], num_crops=[1, 4]),
        processor(prompts[2]),
    ]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    for row, single in enumerate(alone):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(ids, single["input_ids"][0])
        padding = batch["input_ids"][row][: -len(ids)]
        assert (padding == processor.tokenizer.pad_token_id).all()
    assert torch.equal(batch["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[1]["pixel_values"]]))
    assert torch.equal(batch["image_sizes"], torch.cat([alone[0]["image_sizes"], alone[1]["image_sizes"]]))
    assert "pixel_values" not in alone[2]


def test_counts_follow_the_tag_in_any_order_and_repeated(processor: Processor) -> None:
    ids = processor("<|image_2|><|image_1|><|image_2|>", images=[SQUARE, WIDE], num_crops=[1, 4])["input_ids"][0]
    first, second = tokens(64, 64, 64, 4), tokens(64, 128, 64, 4)  # under 4 crops the wide one takes two tiles
    assert ids.tolist() == [1, *[-2] * second, 1, *[-1] * first, 1, *[-2] * second, 1]


def test_untagged_images_come_first_in_the_first_user_turn(processor: Processor) -> None:
    images = [SQUARE, SQUARE]
    for bare, tagged in (
        ("Hi", "<|image_1|>\n<|image_2|>\nHi"),
        ("<|system|>\nx<|end|>\n<|user|>\nHi", "<|system|>\nx<|end|>\n<|user|>\n<|image_1|>\n<|image_2|>\nHi"),
    ):
        assert torch.equal(processor(bare, images)["input_ids"], processor(tagged, images)["input_ids"])


def test_parts_of_a_chat_become_tags(processor: Processor) -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    text = processor.apply_chat_template([turn])
    assert text == "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n"
    ids = processor(text, images=[SQUARE])["input_ids"]
    assert processor.batch_decode(ids) == [processor.decode(ids[0])]
    assert "Hi" in processor.decode(ids[0].tolist())


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ("x <|image_3|>", [SQUARE], r"<\|image_3\|> for 1 images"),
        ("x <|image_0|>", [SQUARE], r"<\|image_0\|>"),
        ("x <|image_1|>", None, r"<\|image_1\|> for 0 images"),
        ("<|image_1|>", [SQUARE, SQUARE], r"no <\|image_2\|>"),
        ("x", SQUARE, "must be a list"),
        ("x", [[SQUARE]], "flat list"),
        (["a", "b"], [SQUARE, SQUARE], "2 lists"),
        (["a", "b"], [[SQUARE]], "2 lists"),
        ("x", ["/no/such/file.png"], "/no/such/file.png"),
        ("", None, "prompts"),
        ([], None, "prompts"),
        ([3], None, "prompts"),
    ],
)
def test_mistakes_are_named(processor: Processor, prompts: object, images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(prompts, images=images)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_crops", [0, True, [1, 2], "4", 2.0])
def test_bad_num_crops_are_refused(processor: Processor, num_crops: object) -> None:
    with pytest.raises(ValueError, match="num_crops"):
        processor("x", images=[SQUARE], num_crops=num_crops)  # type: ignore[arg-type]


def test_a_text_only_model_takes_the_same_call_without_images(text_processor: Processor) -> None:
    batch = text_processor(["Hi", "Hi there, <|image_1|>"], images=[[], None])
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        len(text_processor.tokenizer.encode(text)) for text in ("Hi", "Hi there, <|image_1|>")
    ]
    with pytest.raises(ValueError, match="text only"):
        text_processor("Hi", images=[SQUARE])


def test_settings_are_read_and_written(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    assert written["num_crops"] == processor.num_crops and written["num_img_tokens"] == 16
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written | {"num_crops": 9}), "utf-8")
    again = Processor.from_folder(tmp_path, processor.config)
    assert again.num_crops == 9
    expected = processor("x", images=[WIDE], num_crops=9)
    assert torch.equal(again("x", images=[WIDE])["input_ids"], expected["input_ids"])
    assert processor.config.vision is not None
    other = processor.config.replace(vision=dataclasses.replace(processor.config.vision, image_mean=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="image_mean"):
        Processor.from_folder(tmp_path, other)


def test_published_settings_survive_a_save(tmp_path: Path) -> None:
    folder = published_file("tokenizers/phi-3.5-vision")
    Processor.from_folder(folder, presets.get("phi-3.5-vision")).save(tmp_path)
    ours, theirs = (json.loads((at / "preprocessor_config.json").read_text("utf-8")) for at in (tmp_path, folder))
    theirs.pop("auto_map")
    assert ours == theirs
