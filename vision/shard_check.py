"""Looking after shards that exist: writing their indices, and reading everything once to see that it is whole."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vision.decode import DecodingLimits, open_image
from vision.descriptions import SkippedSample, parse_description
from vision.prepare import file_digest
from vision.sample_reader import MAX_PIXELS
from vision.shard_index import read_index, scan_shard, write_index
from vision.shards import ShardIndex, find_shards


def index_shards(
    data: str | Path, *, num_workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Writes the index of every shard that has none of its own.

    Args:
        data: see ``vision.shards.find_shards``.
        num_workers: processes.
        progress: called with (shards done, shards in all).

    Returns:
        Numbers of shards, samples and pictures, and what is left out, by reason.
    """
    return _over_shards(_index, data, num_workers, progress)


def check_shards(
    data: str | Path, *, num_workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Reads every description, decodes every picture, and compares every file that ``SHA256SUMS`` beside it names.

    Args:
        data: see ``vision.shards.find_shards``.
        num_workers: processes.
        progress: called with (shards done, shards in all).

    Returns:
        As ``index_shards``, and "damaged": what is wrong, each with the name of its shard or sample.
    """
    return _over_shards(_check, data, num_workers, progress)


def _over_shards(
    function: Callable[[Path], dict[str, Any]],
    data: str | Path,
    num_workers: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    paths = find_shards(data)
    total: dict[str, Any] = {"shards": len(paths), "samples": 0, "pictures": 0, "left_out": Counter(), "damaged": []}
    with ProcessPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(function, paths) if num_workers > 1 else map(function, paths)
        for done, result in enumerate(results, 1):
            for name, value in result.items():
                total[name] += value
            if progress is not None:
                progress(done, len(paths))
    return {**total, "left_out": dict(sorted(total["left_out"].items()))}


def _index(path: Path) -> dict[str, Any]:
    table, left_out = read_index(path) or (None, Counter[str]())
    if table is None:
        table, left_out = scan_shard(path)
        write_index(path, table, left_out)
    return {"samples": len(table), "pictures": len(table.width), "left_out": left_out}


def _check(path: Path) -> dict[str, Any]:
    damaged = []
    sums = path.with_name("SHA256SUMS")
    if sums.is_file():
        for line in sums.read_text("utf-8").splitlines():
            digest, _, name = line.partition("  ")
            if name == path.name and file_digest(path) != digest:
                damaged.append(f"{path} is not the file that {sums} names")
    table, left_out = scan_shard(path)
    if not len(table):
        return {
            "samples": 0,
            "pictures": 0,
            "left_out": left_out,
            "damaged": [*damaged, f"{path} has no usable sample"],
        }
    index = ShardIndex(path)
    for number in range(len(index)):
        try:
            parse_description(index.describe(number), int(index.table.num_images[number]))
            for content in index.read_images(number):
                open_image(content, DecodingLimits(max_pixels=MAX_PIXELS))
        except SkippedSample as error:
            damaged.append(f"{index.name(number)}: {error.reason}: {error}")
        except ValueError as error:
            damaged.append(f"{index.name(number)}: {error}")
    index.close()
    return {"samples": len(table), "pictures": len(table.width), "left_out": left_out, "damaged": damaged}
