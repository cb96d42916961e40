"""The stream of training batches: order, resumption, collation, augmentation."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import phi35
from phi35 import presets
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer
from vision.augment import Augmentation, shift_content
from vision.collator import IGNORED, Conversation, VisionCollator
from vision.data import ShardLoader, open_source
from vision.descriptions import parse_description
from vision.image_transform import ImageTransform
from vision.shard_writer import ShardWriter

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
    def open_rank(rank: int, world_size: int, size: int, **options: object) -> ShardLoader:
        return open_source(
            shards,
            model_config=CONFIG,
            processor=tokenizer,
            rank=rank,
            world_size=world_size,
            micro_batch_size=size,
            seed=1,
            **options,
        )

    alone = rows(take(open_rank(0, 1, 4), 6))
    shares = [take(open_rank(rank, 2, 2, balanced=False), 6) for rank in (0, 1)]
    together = [row for step in range(6) for share in shares for row in rows([share[step]])]
    assert together == alone
    source = open_rank(0, 1, 1)
    assert source.num_samples == 4 * 2 + 3
    first_epoch = rows(take(source, 11))
    pairs = [row for row in first_epoch if min(row) == -2]
    assert len(pairs) == 3 == len(set(pairs))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("world_size", "size", "turns"), [(1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2), (4, 2, 1)])
def test_a_global_batch_holds_the_same_samples_for_any_number_of_ranks(
    shards: Path, tokenizer: Tokenizer, world_size: int, size: int, turns: int, packed: bool
) -> None:
    def open_rank(rank: int = 0, **options: object) -> ShardLoader:
        return open_source(
            shards, model_config=CONFIG, processor=tokenizer, rank=rank, augmentation=True, seed=1, **options
        )

    def samples(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
        if not packed:
            return rows(batches)
        rebuilt = []
        for batch in batches:
            first = 0
            for ids in batch["input_ids"][0].split(batch["sequence_lengths"][0].tolist()):
                rebuilt.append(tuple(torch.where(ids < 0, ids + first, ids).tolist()))
                first -= int(ids.min().clamp(max=0)) + first
        return rebuilt

    def pictures(batches: list[dict[str, torch.Tensor]]) -> list[bytes]:
        return sorted(crop.numpy().tobytes() for batch in batches for crop in batch["pixel_values"])

    whole = take(open_rank(micro_batch_size=8), 4)
    options = {"world_size": world_size, "micro_batch_size": size, "accumulation_steps": turns, "packed": packed}
    ranks = [take(open_rank(rank, **options), 4 * turns) for rank in range(world_size)]
    for step in range(4):
        batches = [batch for rank in ranks for batch in rank[step * turns : (step + 1) * turns]]
        assert sorted(samples(batches)) == sorted(rows([whole[step]]))
        assert pictures(batches) == pictures([whole[step]])


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
    shares = []
    for rank in (0, 1):
        source = open_rank(rank=rank, world_size=2, size=1)
        source.load_state_dict(state)
        shares.append(rows(take(source, 12)))
    assert [sorted(pair) for pair in zip(*shares, strict=True)] == [sorted(rows([batch])) for batch in whole[8:]]
    with pytest.raises(ValueError, match="seed"):
        open_source(shards, model_config=CONFIG, processor=tokenizer, seed=5).load_state_dict(state)


def test_unusable_samples_give_way_and_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(4):
            content = png(picture(number))
            if number == 1:  # its header is whole
                content = content[: len(content) // 2]
            writer.write(f"s{number}", {"messages": turns(f"number {number}?", "yes")}, [("png", content)])
        writer.write("s8", {"messages": turns("<|image_2|>?", "yes")}, [("png", png(picture(8)))])
        writer.write("s9", {"messages": "nonsense"}, [("png", png(picture(9)))])
    streams = []
    for options in ({}, {"cache_decoded": True}, {"num_workers": 1}):
        source = open_source(tmp_path, model_config=CONFIG, processor=tokenizer, micro_batch_size=4, **options)
        streams.append(rows(take(source, 2)))
        assert source.skips() == {"bad_description": 2, "unreadable_image": 2}
        assert not open_source(tmp_path, model_config=CONFIG, processor=tokenizer, rank=1, world_size=2).skips()
    assert streams[0] == streams[1] == streams[2]
    texts = {tokenizer.decode(row) for row in streams[0]}
    assert len(texts) == 3 and not any("number 1" in text for text in texts)


def test_labels_cover_the_replies_through_their_end(tokenizer: Tokenizer) -> None:
    collator = VisionCollator(tokenizer, CONFIG)
    messages = (("user", "<|image_1|>\nwhat?"), ("assistant", "red"), ("user", "and this?"), ("assistant", "a circle"))
    batch = collator([Conversation(messages, (picture(1),)), Conversation((("user", "hi"), ("assistant", "yes")))])
    end = tokenizer.special_ids["<|end|>"]
    last = [end, *tokenizer.encode("\n<|endoftext|>", False)]  # as published, after the last reply alone
    assert last[-1] == tokenizer.special_ids["<|endoftext|>"]
    expected = [
        [*tokenizer.encode("red", False), end, *tokenizer.encode("a circle", False), *last],
        [*tokenizer.encode("yes", False), *last],
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


def test_pictures_cross_as_bytes_and_become_the_crops_of_the_transform(tokenizer: Tokenizer) -> None:
    config = presets.get("tiny-phi-3.5-vision")
    collator = VisionCollator(tokenizer, config, num_crops=6)
    transform = ImageTransform(config.vision)
    sizes = [(64, 64), (40, 90), (200, 31), (64, 64), (128, 192), (90, 40), (1, 1), (300, 300)]
    images = tuple(
        picture(seed, size) if min(size) > 20 else np.full((*size, 3), seed, np.uint8)
        for seed, size in enumerate(sizes)
    )
    turns = (("user", "what?"), ("assistant", "yes"))
    for chosen in (images, images[:1], images[1:2] * 3):
        batch = collator.compact([collator.example(Conversation(turns, chosen))])
        expected = [transform(np.ascontiguousarray(image), 6) for image in chosen]
        assert batch["pictures"].dtype == torch.uint8 and "pixel_values" not in batch
        assert len(batch["pictures"]) == sum(3 * h * w for h, w in (one.image_size for one in expected))
        expanded = collator.expand(batch)
        assert torch.equal(expanded["pixel_values"], torch.cat([one.pixel_values for one in expected]))
        assert expanded["image_sizes"].tolist() == [list(one.image_size) for one in expected]


def test_packed_samples_are_the_padded_ones_in_one_row(tokenizer: Tokenizer) -> None:
    config = presets.get("tiny-phi-3.5-vision")
    padded, packed = (VisionCollator(tokenizer, config, packed=flag) for flag in (False, True))
    conversations = [
        Conversation((("user", "<|image_2|>\n<|image_1|>\nwhat?"), ("assistant", "red")), (picture(1), picture(2))),
        Conversation((("user", "hi"), ("assistant", "yes"))),
        Conversation((("user", "this?"), ("assistant", "a circle")), (picture(3, (40, 90)),)),
    ]
    row, rows = packed(conversations), padded(conversations)
    assert torch.equal(row["pixel_values"], rows["pixel_values"])
    assert "attention_mask" not in row
    model = phi35.create(config, seed=1).train(False)
    with torch.no_grad():
        together = model(**row).logits[0].split(row["sequence_lengths"][0].tolist())
        alone = model(**rows)
        losses = [model(**packed([one])).loss for one in conversations]
    for index, logits in enumerate(together):
        real = rows["attention_mask"][index].bool()
        assert len(logits) == real.sum()
        torch.testing.assert_close(logits, alone.logits[index][real], rtol=0, atol=3e-6)  # measured 6e-7
    counts = torch.tensor([int((packed([one])["labels"] >= 0).sum()) for one in conversations])
    expected = (torch.stack(losses) * counts).sum() / counts.sum()
    with torch.no_grad():
        assert abs(model(**row).loss - expected) < 2e-6  # measured 5e-7


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


def test_a_run_resumes_to_the_bit_in_the_midst_of_everything(shards: Path, tokenizer: Tokenizer) -> None:
    """Mixture, stretches, alternatives, augmentation, packing, balance, accumulation, reading processes."""
    sources = [{"data": str(shards), "weight": 3}, {"data": f"{shards}/*-00001.tar"}]

    def open_rank(num_workers: int) -> ShardLoader:
        return open_source(
            "mixture",
            sources=sources,
            model_config=CONFIG,
            processor=tokenizer,
            rank=1,
            world_size=2,
            micro_batch_size=3,
            accumulation_steps=3,
            shuffle_stretch=4,
            augmentation=True,
            packed=True,
            num_workers=num_workers,
            seed=5,
        )

    whole = take(open_rank(0), 18)
    first = open_rank(2)
    assert all(same(a, b) for a, b in zip(take(first, 9), whole[:9], strict=True))
    state = json.loads(json.dumps(first.state_dict()))
    assert state["position"] == 3 * 18  # three global batches, whatever the reading processes have read ahead
    resumed = open_rank(1)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(take(resumed, 9), whole[9:], strict=True))
    stopped = open_rank(0)
    take(stopped, 11)  # within a global batch: it is computed again as a whole
    assert stopped.state_dict() == state
    sources[0]["weight"] = 2
    with pytest.raises(ValueError, match="weights"):
        open_rank(0).load_state_dict(state)


def test_unknown_and_impossible_settings_are_named(shards: Path, tokenizer: Tokenizer) -> None:
    common = {"model_config": CONFIG, "processor": tokenizer}
    for options, message in (
        ({"rank": 2, "world_size": 2}, "rank < world_size"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"shuffle_stretch": 0}, "stretch"),
        ({"sources": [{"data": str(shards)}]}, "data='mixture'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(shards, **common, **options)
    for sources, message in (
        (None, "data='mixture'"),
        ([], "weights"),
        ([{"data": "absent"}], "no shards"),
        ([{"weight": 1}], "needs 'data'"),
        ([{"data": str(shards), "share": 1}], "needs 'data'"),
        ([{"data": str(shards), "weight": 0}], "weights"),
        ([{"data": str(shards), "weight": "much"}], "numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("mixture", sources=sources, **common)


ABANDONED = """
import sys
from pathlib import Path
from phi35 import presets
from phi35.tokenizer import Tokenizer
from vision.data import open_source
tokenizer = Tokenizer.from_folder(Path(presets.__file__).parent / "small_model")
config = presets.get("small-vision")
batches = open_source(sys.argv[1], model_config=config, processor=tokenizer, num_workers=2).compact()
print(sorted(next(batches)))
"""


def test_a_process_that_leaves_a_loader_lying_around_ends(shards: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(shards)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pictures" in done.stdout
