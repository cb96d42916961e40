"""The text stream: fixed order for any number of ranks, positions, tokenization on first use."""

import itertools

import numpy as np
import pytest
import torch

from phi35 import presets
from phi35.training.build import SMALL_MODEL
from phi35.training.data import TextSource, open_text, text_files


def samples(world_size, micro_batch_size, count, start=None):
    """First ``count`` samples of the stream, as all ranks together see them."""
    tokens = np.arange(1000, dtype=np.uint16)
    sources = [
        TextSource(tokens, sequence_length=10, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    if start is not None:
        for source in sources:
            source.load_state_dict(start)
    rounds = count // (world_size * micro_batch_size)
    rows = []
    for batches in itertools.islice(zip(*sources, strict=True), rounds):
        rows += [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert len({str(source.state_dict()) for source in sources}) == 1
    return rows, sources[0].state_dict()


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 1), (1, 4), (3, 2), (4, 3)])
def test_order_does_not_depend_on_ranks_or_micro_batches(world_size, micro_batch_size):
    expected, _ = samples(1, 1, 12)
    assert all(row == list(range(row[0], row[0] + 10)) and row[0] % 10 == 0 for row in expected)
    assert expected != sorted(expected)
    assert samples(world_size, micro_batch_size, 12)[0] == expected


def test_a_position_continues_on_another_number_of_ranks():
    whole, _ = samples(1, 1, 24)
    _, state = samples(2, 3, 12)
    assert samples(3, 2, 12, start=state)[0] == whole[12:]


def test_the_stream_begins_again_at_its_end():
    tokens = np.arange(35, dtype=np.uint16)
    batch = next(iter(TextSource(tokens, sequence_length=10, micro_batch_size=4)))
    assert sorted(batch["input_ids"][:3, 0].tolist()) == [0, 10, 20]
    assert batch["input_ids"][3, 0].item() in (0, 10, 20)
    assert batch["input_ids"].dtype == torch.int64 and torch.equal(batch["input_ids"], batch["labels"])


def opened(folder, cache, num_samples, seed=0):
    from phi35.processor import Processor

    config = presets.get("tiny-phi-3.5-mini")
    return open_text(
        str(folder),
        model_config=config,
        processor=Processor.from_folder(SMALL_MODEL, config),
        rank=0,
        world_size=1,
        micro_batch_size=2,
        seed=seed,
        sequence_length=8,
        num_samples=num_samples,
        cache_folder=cache,
        barrier=lambda: None,
    )


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        (tmp_path / "text" / f"d{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / f"d{number % 2}" / f"{number}.py").write_text(f"name_{number} = {number}\n" * 20)
    (tmp_path / "text" / "ignored.bin").write_bytes(b"\xff\x00")
    return tmp_path / "text"


def test_files_become_tokens_once_and_longer_runs_extend_the_same_stream(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("phi35.training.data.SHUFFLED", 4)
    short, long = opened(folder, tmp_path / "cache", 5), opened(folder, tmp_path / "cache", 60)
    assert len(long.tokens) > len(short.tokens) >= 40
    assert np.array_equal(long.tokens[: len(short.tokens)], short.tokens)
    first, second = (list(itertools.islice(source, 3)) for source in (short, long))  # 5 samples are 3 micro-batches
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    files = sorted((tmp_path / "cache").glob("tokens-*.npy"))
    stamps = [path.stat().st_mtime_ns for path in files]
    opened(folder, tmp_path / "cache", 60)
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert not np.array_equal(opened(folder, tmp_path / "cache", 60, seed=1).tokens, long.tokens)


def test_documents_end_with_the_end_of_text_id(folder, tmp_path):
    from phi35.tokenizer import Tokenizer

    source = opened(folder, tmp_path / "cache", 10_000)
    assert int((np.asarray(source.tokens) == 1000).sum()) == 6
    tokenizer = Tokenizer.from_folder(SMALL_MODEL)
    first = np.asarray(source.tokens)[: list(source.tokens).index(1000)].tolist()
    assert tokenizer.decode(first).strip() in {f"name_{n} = {n}\n" * 20 for n in range(6)} | {
        (f"name_{n} = {n}\n" * 20).strip() for n in range(6)
    }


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        text_files(str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no file"):
        text_files(str(empty))
    with pytest.raises(ValueError, match="fewer than one sample"):
        TextSource(np.arange(5), sequence_length=10, micro_batch_size=1)


def test_the_interpreters_own_library_is_at_hand():
    files = text_files("stdlib")
    assert len(files) > 100 and all(path.suffix == ".py" for path in files)
    assert files == sorted(files) and not any("site-packages" in path.parts for path in files)
