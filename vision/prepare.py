"""Building shards from other people's data: in parallel, checked, and whole or not at all.

Records [k n, (k + 1) n) become shard k, so that processes share the work and a run that was killed goes on where it
stopped: it builds in ``OUT.partial`` and keeps finished shards as long as sources and settings are the same. At the end
come ``report.json`` and ``SHA256SUMS``, everything is brought to disk, and the folder gets its name.
"""

import hashlib
import io
import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision.decode import DecodingLimits, ImageTooLargeError, open_image
from vision.descriptions import SkippedSample
from vision.record_sources import RecordSource, open_records
from vision.records import CAPTION_REQUEST, ImageReference, to_sample
from vision.sample_reader import MAX_PIXELS
from vision.shard_index import MAX_IMAGE_BYTES
from vision.shard_writer import ShardFile, finish_shard

_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
_KEPT_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How shards are built.

    Attributes:
        image_root: folder that pictures' paths start from and never leave; None takes the source's folder.
        samples_per_shard: records of a shard.
        request: what a caption answers.
        max_pixels: samples with larger pictures are left out.
        max_side: pictures are reduced until their longer side has so many pixels (Lanczos, then JPEG at quality 95,
            or PNG where the original was lossless); None keeps the files as they are.
    """

    image_root: str | None = None
    samples_per_shard: int = 1000
    request: str = CAPTION_REQUEST
    max_pixels: int = MAX_PIXELS
    max_side: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_pixels", "max_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def prepare(
    source: str | Path,
    output: str | Path,
    settings: PrepareSettings | None = None,
    *,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the shards of a source.

    Args:
        source: see ``vision.record_sources.open_records``.
        output: folder that appears when all is done.
        settings: how.
        num_workers: processes.
        progress: called with (records done, records in all).

    Returns:
        The report, as in ``report.json``.

    Raises:
        ValueError: if the source cannot be read, the output exists, or no record makes a sample.
    """
    settings = settings or PrepareSettings()
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{str(output)!r} exists already; give another folder, or remove it")
    records = open_records(source)
    folder = output.with_name(output.name + ".partial")
    root = Path(settings.image_root or (source if Path(source).is_dir() else Path(source).parent)).resolve()
    _begin(folder, records, settings, root)
    job = _Job(records, folder, root, settings)
    results = _run(job, num_workers, progress)
    report = _report(str(source), settings, len(records), results)
    if not report["samples"]:
        raise ValueError(
            f"none of the {len(records)} records of {str(source)!r} makes a sample: {report['left_out']}; "
            f"for example {report['examples']}"
        )
    _finish(folder, output, report, results)
    return report


class _Job:
    """Builds single shards; a copy of it works in every process."""

    def __init__(self, records: RecordSource, folder: Path, root: Path, settings: PrepareSettings) -> None:
        self.records, self.folder, self.root, self.settings = records, folder, root, settings

    @property
    def num_shards(self) -> int:
        return -(-len(self.records) // self.settings.samples_per_shard)

    def bounds(self, number: int) -> tuple[int, int]:
        start = number * self.settings.samples_per_shard
        return start, min(start + self.settings.samples_per_shard, len(self.records))

    def result_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.result.json"

    def build(self, number: int) -> dict[str, Any]:
        """Writes shard ``number`` and what came of it, last."""
        path = self.folder / f"shard-{number:05d}.tar"
        partial = path.with_name(path.name + ".partial")
        counts, examples, sizes = Counter[str](), dict[str, list[str]](), list[tuple[int, int]]()
        written, formats = 0, Counter[str]()
        shard = ShardFile(partial)
        for index, (place, record) in enumerate(self.records.read(*self.bounds(number)), self.bounds(number)[0]):
            try:
                if isinstance(record, Exception):
                    raise SkippedSample("bad_record", f"cannot be read: {record}")
                description, references = to_sample(record, self.settings.request)
                images = [self._image(reference, sizes) for reference in references]
            except SkippedSample as error:
                counts[error.reason] += 1
                examples.setdefault(error.reason, []).append(f"{place}: {error}"[:500])
                del examples[error.reason][_KEPT_EXAMPLES:]
                continue
            shard.write(f"{index:09d}", {"source": place, **description}, images)
            formats.update(suffix for suffix, _ in images)
            written += 1
        shard.close()
        result: dict[str, Any] = {"number": number, "samples": written, "left_out": counts, "examples": examples}
        result |= {"formats": formats, "sizes": sizes, "files": {}}
        if written:
            finish_shard(partial, path)
            for file in (path, path.with_name(f"{path.stem}.index.npz")):
                result["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        else:
            partial.unlink()
        _write_whole(self.result_path(number), json.dumps(result))
        return result

    def _image(self, reference: ImageReference, sizes: list[tuple[int, int]]) -> tuple[str, bytes]:
        """(suffix, bytes) of a picture, decoded once to see that it can be."""
        content = reference if isinstance(reference, bytes) else self._fetch(reference)
        if len(content) > MAX_IMAGE_BYTES:
            raise SkippedSample("image_too_large", f"a picture file takes {len(content)} bytes")
        try:
            picture = open_image(content, DecodingLimits(max_pixels=self.settings.max_pixels))
            with Image.open(io.BytesIO(content)) as opened:
                kind = opened.format or ""
        except ImageTooLargeError as error:
            raise SkippedSample("image_too_large", str(error)) from error
        except ValueError as error:
            raise SkippedSample("unreadable_image", str(error)) from error
        limit = self.settings.max_side
        reduced = limit is not None and max(picture.size) > limit
        if reduced:
            assert limit is not None
            scale = limit / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        sizes.append(picture.size)
        if kind in _SUFFIXES and not reduced:
            return _SUFFIXES[kind], content
        buffer = io.BytesIO()
        if kind in ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"):
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
            return "jpg", buffer.getvalue()
        picture.save(buffer, "PNG")
        return "png", buffer.getvalue()

    def _fetch(self, reference: str) -> bytes:
        """Bytes of a picture below the root; nothing else is ever opened."""
        if "://" in reference or reference.startswith(("data:", "pipe:")) or "\0" in reference:
            raise SkippedSample("remote_image", f"{reference[:200]!r} is an address: fetch pictures first")
        try:
            path = (self.root / reference).resolve()
            inside = path.is_relative_to(self.root)
            size = path.stat().st_size if inside and path.is_file() else -1
            content = path.read_bytes() if 0 <= size <= MAX_IMAGE_BYTES else b""
        except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
            raise SkippedSample("missing_image", f"{reference[:200]!r} cannot be read: {error}") from error
        if not inside:
            raise SkippedSample("outside_root", f"{reference[:200]!r} leads out of {self.root}")
        if size < 0:
            raise SkippedSample("missing_image", f"{reference[:200]!r} is no file below {self.root}")
        if size > MAX_IMAGE_BYTES:
            raise SkippedSample("image_too_large", f"{reference[:200]!r} takes {size} bytes")
        return content


_job: _Job | None = None  # of a worker process: sent once, not with every shard


def _enter(job: _Job) -> None:
    global _job
    _job = job


def _build(number: int) -> dict[str, Any]:
    assert _job is not None
    return _job.build(number)


def _run(job: _Job, num_workers: int, progress: Callable[[int, int], None] | None) -> list[dict[str, Any]]:
    """Results of all shards in order, those of an earlier attempt among them."""
    results: dict[int, dict[str, Any]] = {}

    def done(result: dict[str, Any]) -> None:
        results[result["number"]] = result
        if progress is not None:
            finished = sum(stop - start for start, stop in map(job.bounds, results))
            progress(finished, len(job.records))

    missing = []
    for number in range(job.num_shards):
        if job.result_path(number).is_file():
            done(json.loads(job.result_path(number).read_text()))
        else:
            missing.append(number)
    if num_workers <= 1:
        for number in missing:
            done(job.build(number))
    else:
        with ProcessPoolExecutor(num_workers, initializer=_enter, initargs=(job,)) as pool:
            for future in as_completed([pool.submit(_build, number) for number in missing]):
                done(future.result())
    return [results[number] for number in sorted(results)]


def _begin(folder: Path, records: RecordSource, settings: PrepareSettings, root: Path) -> None:
    """Makes the folder, or empties it where it belongs to another build."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in records.files]
    digest = hashlib.sha256(json.dumps([stats, asdict(settings), str(root)]).encode()).hexdigest()
    plan = folder / "plan.json"
    if plan.is_file() and json.loads(plan.read_text()).get("digest") == digest:
        for unfinished in folder.glob("*.partial"):
            unfinished.unlink()
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if not old.name.startswith(("shard-", "plan.json", "report.json", "SHA256SUMS")):
            raise ValueError(f"{str(folder)!r} holds {old.name!r}, which no build left there; remove it")
        old.unlink()
    _write_whole(plan, json.dumps({"digest": digest}))


def _report(source: str, settings: PrepareSettings, count: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    left_out, formats, examples = Counter[str](), Counter[str](), dict[str, list[str]]()
    for result in results:
        left_out.update(result["left_out"])
        formats.update(result["formats"])
        for reason, texts in result["examples"].items():
            examples[reason] = [*examples.get(reason, []), *texts][:_KEPT_EXAMPLES]
    sides = np.array([size for result in results for size in result["sizes"]]).reshape(-1, 2)
    pixels = sides.prod(axis=1) / 1e6
    quantiles = {} if not len(sides) else {name: round(float(np.quantile(pixels, q)), 3) for name, q in _QUANTILES}
    return {
        "source": source,
        "settings": asdict(settings),
        "records": count,
        "samples": sum(result["samples"] for result in results),
        "pictures": len(sides),
        "left_out": dict(sorted(left_out.items())),
        "examples": dict(sorted(examples.items())),
        "formats": dict(sorted(formats.items())),
        "megapixels": quantiles,
        "shards": sum(1 for result in results if result["files"]),
        "bytes": sum(file["bytes"] for result in results for file in result["files"].values()),
        "versions": {"python": platform.python_version(), "pillow": Image.__version__, "numpy": np.__version__},
    }


_QUANTILES = (("smallest", 0.0), ("median", 0.5), ("p95", 0.95), ("largest", 1.0))


def _finish(folder: Path, output: Path, report: dict[str, Any], results: list[dict[str, Any]]) -> None:
    _write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    files = {name: file["sha256"] for result in results for name, file in result["files"].items()}
    files["report.json"] = file_digest(folder / "report.json")
    _write_whole(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items())))
    if output.exists():
        output.rmdir()  # empty, as checked
    folder.rename(output)
    _sync_folder(output.parent)
    for result in results:
        (output / f"shard-{result['number']:05d}.result.json").unlink()
    (output / "plan.json").unlink()


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
