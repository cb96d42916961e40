"""Shards: webdataset's own form, the index beside them, and writing."""

import io
import json
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision.shard_index import ShardTable, index_path, open_index, read_index, scan_shard, write_index
from vision.shard_writer import ShardWriter
from vision.shards import ShardIndex, find_shards


def png(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def described(text: str = "!", **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], **more}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


DESCRIPTION = json.dumps(described()).encode()


def test_written_samples_come_back_in_order_with_their_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(5):
            pictures = [("png", png(number)), ("png", png(100 + number))]
            writer.write(f"sample-{number}", described(str(number)), pictures)
    index = ShardIndex(tmp_path)
    assert [path.name for path in index.paths] == [f"shard-{number:05d}.tar" for number in range(3)]
    assert len(index) == 5 and index.shard_sizes == [2, 2, 1] and not index.left_out
    assert [index.describe(number) for number in range(5)] == [described(str(number)) for number in range(5)]
    assert index.read_images(3) == [png(3), png(103)]
    assert index.name(3) == f"sample 'sample-3' of {tmp_path / 'shard-00001.tar'}"
    index.close()


def test_shards_and_webdataset_understand_each_other(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        writer.write({"__key__": "a", "json": described("x"), "0.png": png(1), "1.png": png(2)})
    index = ShardIndex(tmp_path / "theirs.tar")
    assert index.describe(0) == described("x")
    assert index.read_images(0) == [png(1), png(2)]
    with ShardWriter(tmp_path / "ours") as ours:
        ours.write("b", described("y"), [("png", png(3))])
    (sample,) = webdataset.WebDataset(str(ours.paths[0]), shardshuffle=False)
    assert sample["__key__"] == "b" and json.loads(sample["json"]) == described("y") and sample["0.png"] == png(3)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("key", described(), [("png", png(7))])
    assert (tmp_path / "one/shard-00000.tar").read_bytes() == (tmp_path / "two/shard-00000.tar").read_bytes()


def same(left: ShardTable, right: ShardTable) -> bool:
    return all(np.array_equal(getattr(left, item.name), getattr(right, item.name)) for item in fields(ShardTable))


def test_the_index_tells_what_a_scan_does_and_is_not_believed_of_another_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    with ShardWriter(tmp_path) as writer:
        writer.write("turned", described("abc", draws=3), [("jpg", buffer.getvalue()), ("png", png(1, (5, 9)))])
        writer.write("text", described("abcdefg"), [])
    (path,) = writer.paths
    stored, left_out = read_index(path)
    scanned, _ = scan_shard(path)
    assert same(stored, scanned) and not left_out
    assert stored.width.tolist() == [20, 9] and stored.height.tolist() == [30, 5]  # the first lies on its side
    assert stored.draws.tolist() == [3, 1] and stored.num_images.tolist() == [2, 0]
    assert stored.text_length.tolist() == [4, 8]

    write_tar(path, [("other.json", DESCRIPTION), ("other.0.png", png())])
    assert read_index(path) is None and len(open_index(path)[0]) == 1
    for damaged in (b"", b"PK\x03\x04 no archive", index_path(path).read_bytes()[:-40]):
        index_path(path).write_bytes(damaged)
        assert read_index(path) is None


def test_an_index_is_never_unpickled(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.json", DESCRIPTION)])
    write_index(path, *scan_shard(path))
    with np.load(index_path(path)) as archive:
        columns = dict(archive)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    np.savez(index_path(path), **{**columns, "width": np.array([Payload()], dtype=object)})
    assert read_index(path) is None and len(ShardIndex(path)) == 1
    assert not (tmp_path / "ran").exists()


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards at"):
        ShardIndex(tmp_path)
    (tmp_path / "text.tar").write_text("this is no archive" * 100)
    with pytest.raises(ValueError, match=r"uncompressed tar files.*unreadable_shard"):
        ShardIndex(tmp_path)
    for key in ("a.b", "a/b", "", "x" * 81):
        with ShardWriter(tmp_path / "x") as writer, pytest.raises(ValueError, match="dots"):
            writer.write(key, {}, [])


def test_shards_of_a_writer_that_died_are_not_taken_for_the_whole(tmp_path):
    with pytest.raises(RuntimeError, match="died"), ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for key in "ab":
            writer.write(key, described(), [])
        raise RuntimeError("died")
    with pytest.raises(ValueError, match="no shards"):
        find_shards(tmp_path)
    with ShardWriter(tmp_path) as writer:
        writer.write("c", described(), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.index.npz", "shard-00000.tar"]
