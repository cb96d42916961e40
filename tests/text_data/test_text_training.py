"""Training runs over text of every form: hostile files end no run, resumes are exact, ranks read alike."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from distributed import RankError, run_distributed
from text_data import CONFIG, chat, opened, small_processor, write_lines

from phi35.data.documents import open_documents
from phi35.data.encoding import ChatEncoder
from phi35.data.opening import open_text
from phi35.data.prepare import prepare_tokens


def settings(output, **changes):
    base = {
        "model": "tiny-phi-3.5-mini",
        "sequence_length": 48,
        "global_batch_size": 4,
        "max_steps": 6,
        "warmup_steps": 2,
        "adam_epsilon": 1e-4,
        "output_dir": str(output),
        "export": False,
        "keep_last": 0,
        "trackers": [],
    }
    return {**base, **changes}


def train_and_read(rank, world_size, values):
    """Lines of the metrics by step."""
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else {line["step"]: line for line in summary.history}


def losses(lines):
    return {step: line["loss"].hex() for step, line in lines.items()}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Good documents of every form among those that somebody broke, or means ill with."""
    folder = tmp_path_factory.mktemp("hostile")
    good = [{"text": f"the number {number} stands between {number - 1} and {number + 1}. " * 3} for number in range(60)]
    bad = [b'{"text": "cut off', b'{"text": "\xff\xfe"}', {"text": ""}, {"other": 1}, {"text": ["x"]}, b"\x00\x01", b""]
    write_lines(folder / "lines.jsonl", [*good[:30], *bad, *good[30:], {"text": "pipe:touch owned; http://10.0.0.1/"}])
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    (folder / "fine.md").write_text("# A heading\n\nand some text under it, of no great length.\n" * 4)
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name, content in (("../up.txt", b"x"), ("a.pkl", b"\x80\x04."), ("b.txt", b"text of a shard " * 20)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = (folder / "shard.tar").read_bytes()
    (folder / "short.tar").write_bytes(whole[:3000])
    (folder / "link.txt").symlink_to("/etc/passwd")
    return str(folder)


def test_hostile_documents_end_no_run_and_are_counted_by_reason(hostile, tmp_path):
    values = settings(tmp_path, data=hostile, max_steps=25, global_batch_size=2)
    lines = run_distributed(train_and_read, 2, values)[0]
    assert sorted(lines) == list(range(1, 26)) and lines[25]["loss"] < lines[1]["loss"] - 1
    skips = lines[25]["data_skips"]
    assert skips == lines[1]["data_skips"]  # all found while tokenizing: counted once, not once a rank or an epoch
    expected = {"broken_json": 2, "bad_utf8": 2, "empty": 3, "missing_text": 2, "foreign_member": 4}
    assert skips == {**expected, "truncated_shard": 1, "outside_link": 1}


def write_chats(folder):
    """Chats of one to four turns, one of them longer than a row, one without a reply."""
    records = [chat(*[f"turn {turn} of {number}" for turn in range(2 + 2 * (number % 2))]) for number in range(30)]
    records += [chat("long " * 60, "reply"), chat("fits", "yes", "long " * 60, "no"), chat("nobody answers")]
    return write_lines(folder / "chats.jsonl", records)


def mixture(tmp_path):
    """Chats as JSON lines, the library's sources, and prepared tokens, by weight."""
    path = write_chats(tmp_path / "chats")
    texts = write_lines(tmp_path / "texts" / "a.jsonl", [{"body": f"body {number} " * 9} for number in range(40)])
    prepare_tokens(
        open_documents(path),
        ChatEncoder(small_processor().tokenizer),
        tmp_path / "tokens",
        vocab_size=CONFIG.vocab_size,
        show_progress=False,
    )
    return [
        {"data": str(path), "weight": 2, "overlong": "drop_turns"},
        {"data": str(texts), "weight": 1.0, "text_field": "body"},
        {"data": str(tmp_path / "tokens"), "weight": 0.5},
    ]


def test_a_mixture_resumes_to_the_bit_with_workers_and_reads_alike_on_two_ranks(tmp_path):
    options = {"data": "mixture", "data_options": {"sources": mixture(tmp_path), "buffer_size": 8}}
    values = settings(tmp_path / "straight", **options, schedule="constant", zero_stage=1)
    straight = run_distributed(train_and_read, 1, values)[0]
    parts = {**values, "output_dir": str(tmp_path / "parts"), "num_workers": 1}
    run_distributed(train_and_read, 1, {**parts, "max_steps": 3})
    resumed = run_distributed(train_and_read, 1, parts)[0]
    assert losses(resumed) == losses(straight)
    assert resumed[6]["data_skips"] == straight[6]["data_skips"]
    two = run_distributed(train_and_read, 2, {**values, "output_dir": str(tmp_path / "two")})[0]
    for step, line in straight.items():
        assert line["loss"] == pytest.approx(two[step]["loss"], rel=1e-6)
        assert (line["tokens"], line["data_skips"]) == (two[step]["tokens"], two[step]["data_skips"])


def test_chats_learn_the_replies_alone(tmp_path):
    source = opened(write_chats(tmp_path), tmp_path / "cache", sequence_length=64, num_samples=20)
    assert source.skips() == {"no_reply": 1}
    tokenizer = small_processor().tokenizer
    end, assistant = tokenizer.special_ids["<|end|>"], tokenizer.special_ids["<|assistant|>"]
    replies = 0
    for batch, _ in zip(source, range(10), strict=False):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            inside = False
            for token, label in zip(ids, labels, strict=True):
                assert (label == token) if inside else (label == -100)
                replies += token == assistant
                inside = (inside or token == assistant) and token != end
    assert replies > 20


def test_documents_are_tokenized_once_and_longer_runs_extend_the_same_stream(tmp_path):
    data = write_lines(tmp_path / "data" / "a.jsonl", [{"text": f"text number {number} " * 4} for number in range(200)])
    short, long = (opened(data, tmp_path / "cache", count) for count in (5, 250))
    folders = sorted((tmp_path / "cache").iterdir())
    assert len(folders) == 2
    sizes = sorted(json.loads((folder / "index.json").read_text())["documents"] for folder in folders)
    assert sizes[0] < sizes[1] < 200
    for one, other, _ in zip(short, long, range(3), strict=False):  # 5 samples are 3 micro-batches
        assert torch.equal(one["input_ids"], other["input_ids"])
    stamps = [path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()]
    opened(data, tmp_path / "cache", 250)
    assert [path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()] == stamps
    other = opened(data, tmp_path / "cache", 250, seed=1)
    assert not torch.equal(next(iter(other))["input_ids"], next(iter(long))["input_ids"])


def test_the_prepared_part_lasts_as_long_as_the_run_and_says_so_behind_it(tmp_path):
    data = write_lines(tmp_path / "data" / "a.jsonl", [{"text": f"text number {number} " * 4} for number in range(400)])
    for packing in ("best_fit", "concatenate"):
        source = opened(data, tmp_path / "cache", 50, packing=packing, num_workers=1)
        assert not source.mixture.streams[0].files.is_complete
        batches = iter(source)
        assert len([next(batches) for _ in range(25)]) == 25
        with pytest.raises(ValueError, match="prepared part of the data ended"):
            for _ in batches:
                pass


def test_overlong_chats_leave_enough_for_the_run(tmp_path):
    long, short = chat("q " * 40, "a"), chat("q", "a")
    data = write_lines(tmp_path / "data" / "a.jsonl", [long if number % 10 else short for number in range(4000)])
    source = opened(data, tmp_path / "cache", 40, sequence_length=20)
    batches = iter(source)
    for _ in range(20):
        next(batches)
    assert source.skips()["too_long"] > 300


def test_a_bare_file_of_tokens_trains(tmp_path):
    np.save(tmp_path / "a.npy", np.tile(np.array([5, 6, 7, 8, CONFIG.eos_token_id], dtype=np.uint16), 40))
    lines = run_distributed(train_and_read, 1, settings(tmp_path / "run", data=str(tmp_path / "a.npy"), max_steps=30))[
        0
    ]
    assert lines[30]["loss"] < 3 < 6 < lines[1]["loss"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "mixture"}, "data='mixture' with data_options.sources"),
        ({"sources": [{"data": "stdlib"}]}, "data='mixture' with data_options.sources"),
        ({"data": "mixture", "sources": [{"data": "stdlib", "wieght": 2}]}, r"unknown keys \['wieght'\]"),
        ({"data": "mixture", "sources": [{"weight": 2}]}, "'data' is missing"),
        ({"data": "mixture", "sources": [{"data": "pipe:curl http://x"}]}, "local files only"),
        ({"kind": "poem"}, "kind must be one of"),
        ({"overlong": "cut"}, "overlong must be one of"),
        ({"data": "http://127.0.0.1/x.jsonl"}, "local files only"),
        ({"packing": "loose"}, "packing must be"),
        ({"data": "mixture", "sources": [{"data": "DATA", "weight": 0}]}, "weights must be positive"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    data = write_lines(tmp_path / "data" / "a.jsonl", [{"text": "text"}] * 40)
    options = json.loads(json.dumps(options).replace("DATA", str(data)))
    with pytest.raises(ValueError, match=message):
        opened(options.pop("data", data), tmp_path / "cache", **options)


def open_with_wrong_tokenizer(rank, world_size, data, cache):
    open_text(
        data,
        model_config=CONFIG.replace(vocab_size=600, eos_token_id=1, pad_token_id=1, stop_token_ids=(1,)),
        processor=small_processor(),
        rank=rank,
        world_size=world_size,
        micro_batch_size=1,
        seed=0,
        sequence_length=8,
        num_samples=4,
        cache_folder=cache,
        barrier=torch.distributed.barrier,
    )


def test_a_mistake_that_the_first_rank_finds_ends_all_ranks(tmp_path):
    data = write_lines(tmp_path / "data" / "a.jsonl", [{"text": "some text"}] * 40)
    with pytest.raises(RankError, match="vocabulary ends at 599|first rank could not tokenize"):
        run_distributed(open_with_wrong_tokenizer, 2, str(data), tmp_path / "cache", timeout=60)
