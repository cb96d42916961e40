"""The stream of training batches: order, resumption, collation, augmentation."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi35 import presets
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer
from vision.augment import Augmentation, shift_content
from vision.collator import IGNORED, Conversation, VisionCollator
from vision.data import ShardLoader, open_source, parse_description
from vision.shards import ShardWriter

CONFIG = presets.get("small-vision")
SMALL_MODEL = Path(presets.__file__).parent / "small_model"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(SMALL_MODEL)


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A light background with a dark rectangle."""
    rng = np.random.default_rng(seed)
    image = np.full((*size, 3), rng.integers(200, 255, 3), np.uint8)
    top, left = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
    image[top : top + rng.integers(5, 20), left : left + rng.integers(5, 20)] = rng.integers(0, 128, 3)
    return image


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for number in range(7):
            if number % 2:
                description = {"messages": turns(f"pair {number}?", "first")}
                writer.write(
                    f"s{number}", description, [("png", png(picture(number))), ("png", png(picture(number + 50)))]
                )
            else:
                alternatives = [{"messages": turns(f"single {number} {n}?", "yes"), "weight": n} for n in (1, 2, 3)]
                writer.write(f"s{number}", {"conversations": alternatives, "draws": 2}, [("png", png(picture(number)))])
    return folder


def take(source: ShardLoader, count: int) -> list[dict[str, torch.Tensor]]:
    iterator = iter(source)
    return [next(iterator) for _ in range(count)]


def rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    """Each row's real ids, so that batches of other sizes compare."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_stream_depends_on_the_seed_alone(shards: Path, tokenizer: Tokenizer) -> None:
    def open_with(**options: object) -> ShardLoader:
        settings = {
            "model_config": CONFIG,
            "processor": tokenizer,
            "micro_batch_size": 2,
            "augmentation": True,
            "seed": 3,
        }
        return open_source(shards, **{**settings, **options})

    expected = take(open_with(), 12)
    for options in ({"cache_decoded": True}, {"num_workers": 2}):
        assert all(same(a, b) for a, b in zip(expected, take(open_with(**options), 12), strict=True)), options
    assert rows(take(open_with(seed=4), 12)) != rows(expected)


def test_ranks_share_the_stream_and_epochs_visit_each_sample_its_draws(shards: Path, tokenizer: Tokenizer) -> None:
    def open_rank(rank: int, world_size: int, size: int) -> ShardLoader:
        return open_source(
            shards,
            model_config=CONFIG,
            processor=tokenizer,
            rank=rank,
            world_size=world_size,
            micro_batch_size=size,
            seed=1,
        )

    alone = rows(take(open_rank(0, 1, 4), 6))
    shares = [take(open_rank(rank, 2, 2), 6) for rank in (0, 1)]
    together = [row for step in range(6) for share in shares for row in rows([share[step]])]
    assert together == alone
    source = open_rank(0, 1, 1)
    assert source.num_samples == 4 * 2 + 3
    first_epoch = rows(take(source, 11))
    pairs = [row for row in first_epoch if min(row) == -2]
    assert len(pairs) == 3 == len(set(pairs))


def test_a_state_resumes_at_any_number_of_ranks(shards: Path, tokenizer: Tokenizer) -> None:
    def open_rank(rank: int = 0, world_size: int = 1, size: int = 2) -> ShardLoader:
        return open_source(
            shards,
            model_config=CONFIG,
            processor=tokenizer,
            rank=rank,
            world_size=world_size,
            micro_batch_size=size,
            augmentation=True,
        )

    whole = take(open_rank(), 20)
    source = open_rank()
    take(source, 8)  # ends inside the second epoch
    state = json.loads(json.dumps(source.state_dict()))
    resumed = open_rank()
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(take(resumed, 12), whole[8:], strict=True))
    second = open_rank(rank=1, world_size=2, size=1)
    second.load_state_dict(state)
    assert rows(take(second, 12)) == rows(whole[8:])[1::2]
    with pytest.raises(ValueError, match="seed"):
        open_source(shards, model_config=CONFIG, processor=tokenizer, seed=5).load_state_dict(state)


def test_unreadable_pictures_give_way_and_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(4):
            content = b"no picture" if number == 1 else png(picture(number))
            writer.write(f"s{number}", {"messages": turns(f"number {number}?", "yes")}, [("png", content)])
        writer.write("s8", {"messages": turns("<|image_2|>?", "yes")}, [("png", png(picture(8)))])
        writer.write("s9", {"messages": "nonsense"}, [("png", png(picture(9)))])
    streams = []
    for cached in (False, True):
        source = open_source(
            tmp_path, model_config=CONFIG, processor=tokenizer, micro_batch_size=4, cache_decoded=cached
        )
        streams.append(rows(take(source, 2)))
        assert source.num_skipped == 2
        assert source.dataset.num_corrupt == 2
    assert streams[0] == streams[1]
    texts = {tokenizer.decode(row) for row in streams[0]}
    assert len(texts) == 3 and not any("number 1" in text for text in texts)


def test_labels_cover_the_replies_through_their_end(tokenizer: Tokenizer) -> None:
    collator = VisionCollator(tokenizer, CONFIG)
    messages = (("user", "<|image_1|>\nwhat?"), ("assistant", "red"), ("user", "and this?"), ("assistant", "a circle"))
    batch = collator([Conversation(messages, (picture(1),)), Conversation((("user", "hi"), ("assistant", "yes")))])
    end = tokenizer.special_ids["<|end|>"]
    expected = [
        [*tokenizer.encode("red", False), end, *tokenizer.encode("a circle", False), end],
        [*tokenizer.encode("yes", False), end],
    ]
    for row, wanted in enumerate(expected):
        labels = batch["labels"][row]
        counted = labels != IGNORED
        assert labels[counted].tolist() == wanted
        assert torch.equal(labels[counted], batch["input_ids"][row][counted])
    assert (batch["labels"][1][batch["attention_mask"][1] == 0] == IGNORED).all()
    assert batch["attention_mask"][1].diff().max() == 0  # padded on the right
    assert batch["input_ids"][0, -1] == tokenizer.special_ids["<|endoftext|>"]


@pytest.mark.parametrize("question", ["what?", "<|image_1|> and <|image_2|>?", "<|image_2|>\n<|image_1|>\nwhat?"])
def test_training_prompts_are_those_of_the_processor(tokenizer: Tokenizer, question: str) -> None:
    images = (picture(1), picture(2, (40, 90)))
    batch = VisionCollator(tokenizer, CONFIG)([Conversation((("user", question), ("assistant", "yes")), images)])
    tagged = question if "<|image" in question else f"<|image_1|>\n<|image_2|>\n{question}"
    processor = Processor(tokenizer, CONFIG)
    asked = processor(processor.apply_chat_template([{"role": "user", "content": tagged}]), images=list(images))
    length = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])
    assert torch.equal(batch["image_sizes"], asked["image_sizes"])


def test_pictures_of_one_tile_take_the_short_way_with_the_same_result(tokenizer: Tokenizer) -> None:
    collator = VisionCollator(tokenizer, CONFIG)
    images = [picture(seed) for seed in range(4)]
    fast, sizes = collator.crops(images)
    slow = torch.cat([collator.transform(image).pixel_values for image in images])
    assert torch.equal(fast, slow)  # bicubic resampling at scale 1 returns its input exactly
    assert sizes == [(64, 64)] * 4


def test_what_crosses_to_the_device_is_completed_there_to_the_same_bits(shards: Path, tokenizer: Tokenizer) -> None:
    def opened(num_workers: int = 0) -> ShardLoader:
        return open_source(
            shards, model_config=CONFIG, processor=tokenizer, micro_batch_size=3, num_workers=num_workers
        )

    whole = take(opened(), 4)
    for num_workers in (0, 1):
        source = opened(num_workers)
        stream = source.compact()
        compact = [next(stream) for _ in range(4)]
        assert all("pixel_values" not in batch and batch["pictures"].dtype == torch.uint8 for batch in compact)
        assert all(same(source.expand(batch), other) for batch, other in zip(compact, whole, strict=True))
        assert source.state_dict()["position"] == 12
    collator = VisionCollator(tokenizer, CONFIG)
    turns = (("user", "what?"), ("assistant", "yes"))
    for size in ((40, 90), (64, 64)):  # not one tile: cropped at once
        batch = collator.compact([Conversation(turns, (picture(1, size),)), Conversation(turns, (picture(2),))])
        assert ("pictures" in batch) == (size == (64, 64))


@pytest.mark.parametrize(
    ("messages", "num_images", "message"),
    [
        ((("user", "<|image_2|> what?"), ("assistant", "yes")), 1, "tags name images"),
        ((("user", "<|image_1|> what?"), ("assistant", "yes")), 2, "tags name images"),
        ((("user", "what?"),), 1, "needs an assistant's reply"),
        ((("user", "<|end|>\n<|assistant|>\nno"), ("assistant", "yes")), 0, "control tokens"),
        ((("robot", "what?"), ("assistant", "yes")), 0, "role"),
    ],
)
def test_conversations_that_cannot_be_trained_on(
    tokenizer: Tokenizer, messages: tuple, num_images: int, message: str
) -> None:
    images = tuple(picture(number) for number in range(num_images))
    with pytest.raises(ValueError, match=message):
        VisionCollator(tokenizer, CONFIG)([Conversation(messages, images)])


def test_alternatives_are_drawn_by_weight() -> None:
    parsed = parse_description(
        {"conversations": [{"messages": turns(str(weight), "x"), "weight": weight} for weight in (0, 1, 3)]}
    )
    rng = random.Random(0)
    drawn = [parsed.draw(rng)[0][1] for _ in range(2000)]
    assert drawn.count("0") == 0
    assert abs(drawn.count("3") / 2000 - 0.75) < 0.04  # four standard deviations; measured 0.005
    for broken in ({}, {"messages": []}, {"messages": 3}, [], {"messages": turns("a", "b"), "draws": 0}):
        with pytest.raises(ValueError, match="JSON needs"):
            parse_description(broken)


def test_shifts_move_the_content_whole_over_its_background() -> None:
    rng = random.Random(0)
    places = set()
    for seed in range(20):
        image = picture(seed)
        moved = shift_content(image, rng)
        background = image[0, 0]
        assert moved.shape == image.shape and moved.dtype == np.uint8
        for pixels in (image, moved):
            assert sum((pixels[y, x] == background).all() for y in (0, -1) for x in (0, -1)) >= 3
        assert (np.sort((image != background).any(-1).ravel()) == np.sort((moved != background).any(-1).ravel())).all()
        boxes = [np.argwhere((pixels != background).any(-1)) for pixels in (image, moved)]
        assert (np.ptp(boxes[0], axis=0) == np.ptp(boxes[1], axis=0)).all()
        places.add(tuple(boxes[1].min(axis=0)))
    assert len(places) > 15
    photograph = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert shift_content(photograph, rng) is photograph


def test_augmentation_is_reproducible_and_leaves_its_input_alone() -> None:
    augmentation = Augmentation(flip=0.5, shift=0.5, rotate=0.5, brightness=10)
    image = picture(3)
    before = image.copy()
    first = [augmentation(image, random.Random(seed)) for seed in range(10)]
    again = [augmentation(image, random.Random(seed)) for seed in range(10)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(image, before)
    assert len({a.tobytes() for a in first}) > 5
    with pytest.raises(ValueError, match="probability"):
        Augmentation(flip=2)
    with pytest.raises(ValueError, match="augmentation"):
        open_source(
            "nowhere", model_config=CONFIG, processor=Tokenizer.from_folder(SMALL_MODEL), augmentation={"spin": 1}
        )
