"""Shards: webdataset's own form, and hostile or broken ones."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision.shards import ShardIndex, ShardWriter, find_shards


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


DESCRIPTION = json.dumps(
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
).encode()


def test_written_samples_come_back_in_order_with_their_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(5):
            writer.write(f"sample-{number}", {"number": number}, [("png", png(number)), ("png", png(100 + number))])
    index = ShardIndex(tmp_path)
    assert [path.name for path in index.paths] == [f"shard-{number:05d}.tar" for number in range(3)]
    assert [sample.key for sample in index.samples] == [f"sample-{number}" for number in range(5)]
    assert [index.describe(sample) for sample in index.samples] == [{"number": number} for number in range(5)]
    assert [index.read(image) for image in index.samples[3].images] == [png(3), png(103)]
    index.close()


def test_shards_and_webdataset_understand_each_other(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        writer.write({"__key__": "a", "json": {"x": 1}, "0.png": png(1), "1.png": png(2)})
    index = ShardIndex(tmp_path / "theirs.tar")
    assert index.describe(index.samples[0]) == {"x": 1}
    assert [index.read(image) for image in index.samples[0].images] == [png(1), png(2)]
    with ShardWriter(tmp_path / "ours") as ours:
        ours.write("b", {"y": 2}, [("png", png(3))])
    (sample,) = webdataset.WebDataset(str(ours.paths[0]), shardshuffle=False)
    assert sample["__key__"] == "b" and json.loads(sample["json"]) == {"y": 2} and sample["0.png"] == png(3)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("key", {"a": [1]}, [("png", png(7))])
    assert (tmp_path / "one/shard-00000.tar").read_bytes() == (tmp_path / "two/shard-00000.tar").read_bytes()


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise RuntimeError('unpickled')",))


def test_pickles_links_and_foreign_members_are_passed_over(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "hostile.tar",
        [
            ("a.json", DESCRIPTION),
            ("a.0.png", png()),
            ("a.pyd", pickle.dumps(Payload())),
            ("a.pth", pickle.dumps(Payload())),
            ("b.c.json", DESCRIPTION),
        ],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("a.1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    index = ShardIndex(path)
    assert [sample.key for sample in index.samples] == ["a"]
    assert len(index.samples[0].images) == 1
    assert index.defects.foreign == 4


@pytest.mark.parametrize("source", ["pipe:touch {}/ran", "https://example.org/a.tar", "s3://bucket/a.tar"])
def test_commands_and_urls_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match="local files only"):
        find_shards(source.format(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_keeps_its_whole_samples(tmp_path: Path) -> None:
    members = [
        (f"{key}.{suffix}", content) for key in "abc" for suffix, content in (("json", DESCRIPTION), ("0.png", png()))
    ]
    path = write_tar(tmp_path / "cut.tar", members)
    content = path.read_bytes()
    path.write_bytes(content[: 512 * 9 + 100])  # a: 4 blocks, b: 4 blocks, c: its first header and part of the JSON
    index = ShardIndex(path)
    assert [sample.key for sample in index.samples] == ["a", "b"]
    assert index.defects.truncated == 1


def test_incomplete_samples_are_counted(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "gaps.tar",
        [("a.0.png", png()), ("b.json", DESCRIPTION), ("b.1.png", png()), ("c.json", DESCRIPTION), ("c.0.png", png())],
    )
    index = ShardIndex(path)
    assert [sample.key for sample in index.samples] == ["c"]
    assert index.defects.incomplete == 2


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards at"):
        ShardIndex(tmp_path)
    (tmp_path / "text.tar").write_text("this is no archive" * 100)
    with pytest.raises(ValueError, match="no uncompressed tar"):
        ShardIndex(tmp_path)
    with ShardWriter(tmp_path / "x") as writer, pytest.raises(ValueError, match="dots"):
        writer.write("a.b", {}, [])


def test_shards_of_a_writer_that_died_are_not_taken_for_the_whole(tmp_path):
    with pytest.raises(RuntimeError, match="died"), ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for key in "ab":
            writer.write(key, {"messages": []}, [])
        raise RuntimeError("died")
    with pytest.raises(ValueError, match="no shards"):
        find_shards(tmp_path)
    with ShardWriter(tmp_path) as writer:
        writer.write("c", {"messages": []}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.tar"]
