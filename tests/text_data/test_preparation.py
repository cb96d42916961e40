"""Preparing token files: the same bytes with any number of workers, and after any number of kills."""

import multiprocessing
import os
import signal
import time

import pytest
from text_data import chat, small_processor, write_lines

from phi35.data.documents import open_documents
from phi35.data.encoding import ChatEncoder, TextEncoder
from phi35.data.prepare import describe, prepare_tokens
from phi35.data.token_files import open_tokens

EOT = 1000


def corpus(folder, count=300):
    """Texts of different lengths, every tenth of them broken in some way."""
    broken = [b'{"text": ', b'{"text": "\xff"}', {"text": ""}, {"no": 1}]
    records = [
        broken[number // 10 % 4] if number % 10 == 3 else {"text": f"text {number} " * (number % 7 + 1)}
        for number in range(count)
    ]
    return write_lines(folder / "a.jsonl", records)


def run(path, output, **options):
    encoder = TextEncoder(small_processor().tokenizer, EOT)
    return prepare_tokens(
        open_documents(path), encoder, output, **{"vocab_size": 1088, "show_progress": False, **options}
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_workers_change_no_byte(tmp_path):
    path = corpus(tmp_path / "data")
    index = run(path, tmp_path / "one", tokens_per_part=1500)
    assert run(path, tmp_path / "two", tokens_per_part=1500, num_workers=2) == index
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(index["parts"]) > 2
    assert index["documents"] == 270
    assert index["skipped"] == {"broken_json": 8, "bad_utf8": 8, "empty": 7, "missing_text": 7}


def test_the_report_names_places(tmp_path):
    index = run(corpus(tmp_path / "data"), tmp_path / "tokens")
    text = describe(index)
    assert "270 documents" in text and "left out 8: broken_json" in text
    assert f"{tmp_path}/data/a.jsonl:4: " in text and text.count("a.jsonl:") == 12


def test_a_finished_folder_is_found_and_another_request_refused(tmp_path):
    path = corpus(tmp_path / "data")
    index = run(path, tmp_path / "tokens")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert run(path, tmp_path / "tokens") == index
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()} == before
    with pytest.raises(ValueError, match="other data or settings"):
        run(path, tmp_path / "tokens", shuffle_seed=3)
    path.write_bytes(path.read_bytes() + b'{"text": "one more"}\n')
    with pytest.raises(ValueError, match="other data or settings"):
        run(path, tmp_path / "tokens")


def prepare_slowly(path, output):
    import phi35.data.prepare as module

    flush = module._PartWriter.flush

    def slow_flush(self):
        flush(self)
        time.sleep(0.02)

    module._PartWriter.flush = slow_flush
    run(path, output, tokens_per_part=300)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    path = corpus(tmp_path / "data")
    run(path, tmp_path / "straight", tokens_per_part=300)
    context, kills = multiprocessing.get_context("fork"), 0
    for attempt in range(100):
        process = context.Process(target=prepare_slowly, args=(path, tmp_path / "killed"))
        process.start()
        process.join(timeout=0.08 + 0.011 * (attempt % 7))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        break
    assert kills >= 2
    finished, expected = contents(tmp_path / "killed"), contents(tmp_path / "straight")
    assert {name: content for name, content in finished.items() if not name.endswith(".partial")} == expected


def test_a_part_that_was_changed_after_a_kill_is_made_again(tmp_path, monkeypatch):
    import phi35.data.prepare as module

    path = corpus(tmp_path / "data")
    run(path, tmp_path / "straight", tokens_per_part=300)
    monkeypatch.setattr(module._PartWriter, "finish", lambda self, *arguments, **options: {})
    run(path, tmp_path / "killed", tokens_per_part=300)
    monkeypatch.undo()
    (tmp_path / "killed" / "part-00001.tokens.npy").write_bytes(b"changed")
    run(path, tmp_path / "killed", tokens_per_part=300)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_an_unfinished_folder_of_other_data_is_refused(tmp_path, monkeypatch):
    import phi35.data.prepare as module

    path = corpus(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(module._PartWriter, "finish", lambda self, *arguments, **options: {})
        run(path, tmp_path / "tokens")
    with pytest.raises(ValueError, match="unfinished preparation of other data"):
        run(path, tmp_path / "tokens", shuffle_seed=1)


def test_shuffled_and_cut_short_it_is_a_prefix_of_the_whole(tmp_path):
    path = corpus(tmp_path / "data")
    whole = run(path, tmp_path / "whole", shuffle_seed=5)
    part = run(path, tmp_path / "part", shuffle_seed=5, num_tokens=500)
    assert whole["complete"] and not part["complete"] and part["tokens"] >= 500
    files, shorter = (open_tokens(tmp_path / name, end_of_text=EOT) for name in ("whole", "part"))
    assert 0 < len(shorter) < len(files)
    for number in range(len(shorter)):
        ids = shorter.read(number, 0, shorter.length(number))[0]
        assert ids.tolist() == files.read(number, 0, files.length(number))[0].tolist()
    run(path, tmp_path / "other", shuffle_seed=6)
    assert contents(tmp_path / "other") != contents(tmp_path / "whole")


def test_ids_beyond_the_vocabulary_and_nothing_usable_are_errors(tmp_path):
    path = corpus(tmp_path / "data")
    with pytest.raises(ValueError, match="vocabulary ends at 499"):
        run(path, tmp_path / "tokens", vocab_size=500)
    nothing = write_lines(tmp_path / "b.jsonl", [b"{", {"text": ""}])
    with pytest.raises(ValueError, match=r"no document can be used.*broken_json"):
        run(nothing, tmp_path / "none")


class DyingEncoder(TextEncoder):
    """Ends its process, as the system does to one that takes too much memory."""

    def __call__(self, record):
        if "text 7 " in str(record):
            os._exit(9)
        return super().__call__(record)


def test_a_worker_that_dies_is_named_and_nothing_hangs(tmp_path):
    encoder = DyingEncoder(small_processor().tokenizer, EOT)
    documents = open_documents(corpus(tmp_path / "data"))
    with pytest.raises(ValueError, match="a worker process died"):
        prepare_tokens(documents, encoder, tmp_path / "tokens", vocab_size=1088, num_workers=1, show_progress=False)


def test_chats_keep_what_is_learned(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat("Hi", "Hello"), chat("no reply")])
    encoder = ChatEncoder(small_processor().tokenizer)
    index = prepare_tokens(open_documents(path), encoder, tmp_path / "tokens", vocab_size=1088, show_progress=False)
    assert index["skipped"] == {"no_reply": 1} and index["kind"] == "chat"
    assert 0 < index["trained_tokens"] < index["tokens"] and index["end_token"] == encoder.end
