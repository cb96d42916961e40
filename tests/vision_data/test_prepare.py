"""Building shards from folders, JSONL, LLaVA's JSON and parquet; what is broken, killed or hostile on the way."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi35 import presets
from phi35.tokenizer import Tokenizer
from vision.data import open_source
from vision.descriptions import SkippedSample
from vision.prepare import PrepareSettings, file_digest, prepare
from vision.records import to_sample
from vision.shard_check import check_shards, index_shards
from vision.shard_index import read_index
from vision.shards import ShardIndex

ROOT = Path(__file__).resolve().parents[2]


def photo(seed: int, size: tuple[int, int] = (40, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight real picture files in a folder with a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number in range(8):
        name = f"sub/p{number}.jpg" if number % 2 else f"p{number}.png"
        photo(number).save(folder / name)
    return folder


def path_of(number: int) -> str:
    return f"sub/p{number}.jpg" if number % 2 else f"p{number}.png"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"image": "a.png", "caption": "a cat"}, turns("Describe the image.", "a cat")),
        ({"image": {"path": "a.png"}, "question": "what?", "answer": "a cat"}, turns("what?", "a cat")),
        (
            {"image": ["a.png", "b.png"], "messages": turns("is <|image_2|> like <|image_1|>?", "no")},
            turns("is <|image_2|> like <|image_1|>?", "no"),
        ),
        (
            {
                "id": 3,
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat?"},
                    {"from": "gpt", "value": "a cat"},
                    {"from": "human", "value": "sure?"},
                    {"from": "gpt", "value": "yes"},
                ],
            },
            [*turns("<|image_1|>\nwhat?", "a cat"), *turns("sure?", "yes")],
        ),
        (
            {"images": ["a", "b"], "conversations": [{"from": "human", "value": "<image> or <image>?"},
                                                     {"from": "gpt", "value": "b"}]},
            turns("<|image_1|> or <|image_2|>?", "b"),
        ),
        (
            {"images": [{"bytes": b"1", "path": None}], "texts": [{"user": "q", "assistant": "a", "source": "x"}] * 2},
            [*turns("q", "a"), *turns("q", "a")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                                       {"type": "text", "text": "what?"}]},
                          {"role": "assistant", "content": "x"}]},
            turns("<|image_1|>\nwhat?", "x"),
        ),
        ({"text": "no picture at all"}, turns("Describe the image.", "no picture at all")),
    ],
)  # fmt: skip
def test_records_of_every_form_become_conversations(record: dict[str, Any], expected: list[dict[str, str]]) -> None:
    description, images = to_sample(record)
    assert description == {"messages": expected}
    named = record.get("images", record.get("image", []))
    assert len(images) == (len(named) if isinstance(named, list) else 1) or "messages" in record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "bad_record"),
        ({}, "bad_record"),
        ({"image": 3, "text": "x"}, "bad_record"),
        ({"image": [None], "text": "x"}, "bad_record"),
        ({"image": "a", "text": ""}, "empty_text"),
        ({"image": "a", "text": None}, "bad_record"),
        ({"image": "a", "conversations": [{"from": "robot", "value": "x"}]}, "bad_record"),
        ({"image": "a", "conversations": [{"from": "human", "value": "<image><image>"},
                                          {"from": "gpt", "value": "x"}]}, "bad_record"),
        ({"image": "a", "messages": turns("<|image_2|>", "x")}, "bad_description"),
        ({"image": "a", "messages": turns("q", "x<|end|>")}, "bad_description"),
        ({"image": "a", "text": "x", "draws": -1}, "bad_description"),
    ],
)  # fmt: skip
def test_records_that_make_no_sample_say_why(record: Any, reason: str) -> None:
    with pytest.raises(SkippedSample) as error:
        to_sample(record)
    assert error.value.reason == reason


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def sources(folder: Path, pictures: Path) -> dict[str, Path]:
    """The same eight samples in every form."""
    records = [{"image": path_of(number), "text": f"picture {number}"} for number in range(8)]
    made = {"jsonl": write_jsonl(folder / "a.jsonl", records)}
    llava = [
        {"id": f"x{number}", "image": path_of(number), "conversations": [
            {"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": f"picture {number}"}]}
        for number in range(8)
    ]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(llava))
    made["json"] = folder / "llava.json"
    for number in range(8):
        beside = (pictures / path_of(number)).with_suffix(".txt" if number < 4 else ".json")
        beside.write_text(f"picture {number}\n" if number < 4 else json.dumps({"caption": f"picture {number}"}))
    made["folder"] = pictures
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": (pictures / path_of(n)).read_bytes(), "path": None}, "question": "Describe the image.",
         "answer": f"picture {n}"} for n in range(8)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
    made["parquet"] = folder / "a.parquet"
    return made


def test_every_source_gives_the_same_samples(tmp_path: Path, pictures: Path) -> None:
    contents = {}
    for name, source in sources(tmp_path, pictures).items():
        seen = []
        settings = PrepareSettings(image_root=str(pictures), samples_per_shard=3)
        report = prepare(
            source, tmp_path / f"out-{name}", settings, num_workers=2 if name == "jsonl" else 1,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )  # fmt: skip
        assert (report["records"], report["samples"], report["pictures"], report["shards"]) == (8, 8, 8, 3)
        assert report["left_out"] == {} and report["formats"] == {"jpg": 4, "png": 4}
        assert sorted(seen)[-1] == (8, 8) and len(seen) == 3
        index = ShardIndex(tmp_path / f"out-{name}")
        texts = [index.describe(number)["messages"][-1]["content"] for number in range(8)]
        contents[name] = sorted(zip(texts, [index.read_images(number)[0] for number in range(8)], strict=True))
        assert [text for text, _ in contents[name]] == [f"picture {number}" for number in range(8)]
    expected = [(f"picture {number}", (pictures / path_of(number)).read_bytes()) for number in range(8)]
    assert all(content == expected for content in contents.values())


def test_checksums_indices_and_the_check_of_finished_shards(tmp_path: Path, pictures: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"image": path_of(n), "text": f"{n}"} for n in range(8)])
    output = tmp_path / "out"
    report = prepare(source, output, PrepareSettings(image_root=str(pictures), samples_per_shard=4))
    assert json.loads((output / "report.json").read_text()) == report
    names = sorted(path.name for path in output.iterdir())
    assert names == ["SHA256SUMS", "report.json", *(
        f"shard-0000{n}{suffix}" for n in (0, 1) for suffix in (".index.npz", ".tar"))]  # fmt: skip
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=output, check=True)
    assert all(read_index(path) is not None for path in output.glob("*.tar"))
    checked = check_shards(output, num_workers=2)
    assert (checked["samples"], checked["pictures"], checked["damaged"]) == (8, 8, [])

    first = output / "shard-00000.tar"
    content = bytearray(first.read_bytes())
    index = ShardIndex(first)
    content[int(index.table.image_offset[2]) + 700] ^= 255  # a flipped byte in a picture
    first.write_bytes(content)
    damaged = check_shards(output)["damaged"]
    assert any("SHA256SUMS" in text for text in damaged) and any("000000002" in text for text in damaged)

    for path in output.glob("*.index.npz"):
        path.unlink()
    assert index_shards(output)["samples"] == 8
    assert all(read_index(path) is not None for path in output.glob("*.tar"))
    with pytest.raises(ValueError, match="exists already"):
        prepare(source, output)


def test_everything_broken_or_hostile_is_left_out_and_reported(tmp_path: Path, pictures: Path) -> None:
    secret = tmp_path / "secret.png"
    photo(99).save(secret)
    (pictures / "link.png").symlink_to(secret)
    (pictures / "broken.jpg").write_bytes(encoded(photo(1), "JPEG")[:300])
    (pictures / "fifo.png").unlink(missing_ok=True)
    os.mkfifo(pictures / "fifo.png")
    hostile = {
        "outside_root": [str(secret), "../secret.png", "sub/../../secret.png", "link.png", "/etc/passwd"],
        "remote_image": [
            "http://169.254.169.254/latest/meta-data", "https://example.org/a.png", "file:///etc/passwd",
            "pipe:touch ran", "data:image/png;base64,AAAA",
        ],
        "missing_image": ["absent.png", "sub", "fifo.png", "x" * 5000, "half \udc80 a character"],
        "unreadable_image": ["broken.jpg"],
    }  # fmt: skip
    records: list[Any] = [{"image": path_of(n), "text": str(n)} for n in range(2)]
    records += [{"image": name, "text": "x"} for names in hostile.values() for name in names]
    records += ["{no json", "[" * 100_000, "3", json.dumps({"image": path_of(3), "text": ""})]
    report = prepare(
        write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", PrepareSettings(image_root=str(pictures))
    )
    assert report["samples"] == 2
    expected = {reason: len(names) for reason, names in hostile.items()}
    assert report["left_out"] == dict(sorted({**expected, "bad_record": 3, "empty_text": 1}.items()))
    assert all(f"a.jsonl:{3 + number}:" in text for number, text in enumerate(report["examples"]["outside_root"]))
    assert not (tmp_path / "ran").exists() and not Path("ran").exists()
    stored = {content for number in range(2) for content in ShardIndex(tmp_path / "out").read_images(number)}
    assert secret.read_bytes() not in stored


def test_pictures_are_reduced_only_where_they_are_larger(tmp_path: Path) -> None:
    large, small = encoded(photo(0, (300, 200)), "JPEG"), encoded(photo(1, (60, 100)))
    grey = encoded(Image.fromarray(np.full((400, 100), 30_000, np.uint16)))
    (tmp_path / "in").mkdir()
    for name, content in (("a.jpg", large), ("b.png", small), ("c.png", grey)):
        (tmp_path / "in" / name).write_bytes(content)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(name)
    prepare(tmp_path / "in", tmp_path / "out", PrepareSettings(max_side=100))
    index = ShardIndex(tmp_path / "out")
    sizes = list(zip(index.table.width.tolist(), index.table.height.tolist(), strict=True))
    assert sizes == [(67, 100), (100, 60), (25, 100)]
    files = [index.read_images(number)[0] for number in range(3)]
    assert files[1] == small
    assert [Image.open(io.BytesIO(content)).format for content in files] == ["JPEG", "PNG", "PNG"]


def test_a_killed_build_leaves_nothing_that_looks_whole_and_goes_on(tmp_path: Path, pictures: Path) -> None:
    records = [{"image": path_of(number % 8), "text": f"picture {number}"} for number in range(1200)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    command = [
        sys.executable, str(ROOT / "scripts/prepare_vision.py"), str(source), "--output", str(tmp_path / "out"),
        "--images", str(pictures), "--workers", "2", "--samples-per-shard", "10",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.result.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.result.json")}
    assert 5 <= len(kept) < 120
    settings = PrepareSettings(image_root=str(pictures), samples_per_shard=10)
    report = prepare(source, tmp_path / "out", settings)
    assert report["samples"] == 1200 and not partial.exists()
    once = prepare(source, tmp_path / "once", settings)
    for path in sorted((tmp_path / "once").glob("*.tar")):
        assert file_digest(path) == file_digest(tmp_path / "out" / path.name)
    assert once["left_out"] == report["left_out"] == {}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any("partial" in name or "result" in name or "plan" in name for name in names)


def test_other_settings_do_not_take_over_what_a_killed_build_left(tmp_path: Path, pictures: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"image": path_of(n), "text": f"{n}"} for n in range(8)])
    settings = PrepareSettings(image_root=str(pictures), samples_per_shard=2)
    stopped: list[int] = []

    def stop(done: int, total: int) -> None:
        stopped.append(done)
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", settings, progress=stop)
    assert stopped == [2, 4]
    again: list[int] = []
    prepare(source, tmp_path / "out", settings, progress=lambda done, total: again.append(done))
    assert again == [2, 4, 6, 8]
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "other", settings, progress=stop)
    report = prepare(source, tmp_path / "other", PrepareSettings(image_root=str(pictures), samples_per_shard=8))
    assert report["shards"] == 1 and len(list((tmp_path / "other").glob("*.tar"))) == 1
    (tmp_path / "third.partial").mkdir()
    (tmp_path / "third.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        prepare(source, tmp_path / "third", settings)


def test_unusable_sources_are_named(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("[")
    for source, message in (
        ("absent", "does not exist"), ("empty", "no record"), ("a.csv", "no source"), ("a.json", "list of records"),
        ("b.json", "not JSON"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"none of the 8 records.*bad_record"):
        prepare(pictures, tmp_path / "out")
    with pytest.raises(ValueError, match="max_side"):
        PrepareSettings(max_side=0)


def test_prepared_shards_train(tmp_path: Path, pictures: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [
        {"images": [path_of(n), path_of(n + 1)], "messages": turns("<|image_2|> or\n<|image_1|>?", f"{n}")}
        for n in range(7)])  # fmt: skip
    prepare(source, tmp_path / "out", PrepareSettings(image_root=str(pictures)))
    config = presets.get("small-vision")
    tokenizer = Tokenizer.from_folder(Path(presets.__file__).parent / "small_model")
    loader = open_source(tmp_path / "out", model_config=config, processor=tokenizer, micro_batch_size=7)
    batch = next(iter(loader))
    assert batch["image_sizes"].shape == (14, 2) and not loader.skips()
    assert sorted(set(batch["input_ids"][batch["input_ids"] < 0].tolist())) == [-2, -1]
