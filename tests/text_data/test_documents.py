"""Documents of every form by their number, and what nobody should trust: nothing runs, all is counted."""

import io
import json
import os
import pickle
import tarfile

import pytest
from text_data import chat, write_lines

from phi35.data.documents import document_files, open_documents
from phi35.data.skips import REASONS, SkippedDocument


def read_all(documents):
    """Every document, or the reason why it is left out."""
    found = []
    for number in range(len(documents)):
        try:
            found.append(documents.read(number))
        except SkippedDocument as error:
            assert error.reason in REASONS and documents.where(number)
            found.append(error.reason)
    return found


def tar_of(path, members):
    """An uncompressed tar of (name, content) members; a TarInfo stands for itself."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_json_lines_are_read_by_number(tmp_path):
    records = [{"text": "one"}, "two", {"text": "drei ß"}]
    path = write_lines(tmp_path / "a.jsonl", records)
    documents = open_documents(path)
    assert read_all(documents) == records
    assert documents.where(2) == f"{path}:3"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # without a last line end
    assert read_all(open_documents(path)) == records


def test_line_starts_are_found_across_blocks(tmp_path, monkeypatch):
    records = [{"text": "x" * size} for size in (0, 1, 5, 30, 2)]
    path = write_lines(tmp_path / "a.jsonl", records)
    monkeypatch.setattr("phi35.data.documents._SCANNED_AT_ONCE", 7)
    assert read_all(open_documents(path)) == records


def test_a_folder_may_hold_every_form(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    write_lines(tmp_path / "deep" / "er" / "a.jsonl", [{"text": "from json"}])
    (tmp_path / "b.md").write_text("from text")
    tar_of(tmp_path / "c.tar", [("x.txt", b"from tar"), ("y.json", json.dumps(chat("q", "a")).encode())])
    table = pyarrow.table({"text": ["row 0", "row 1", "row 2"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    (tmp_path / "ignored.bin").write_bytes(b"\xff\x00")
    found = read_all(open_documents(tmp_path))
    assert found[0] == {"text": "from json"}
    assert found[1:4] == [{"text": f"row {n}", "n": n + 1} for n in range(3)]
    assert found[4:] == ["from tar", chat("q", "a"), "from text"]


def test_nested_parquet_columns_are_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    records = [chat("q", "a"), chat("x", "y", "z", "w")]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chats.parquet")
    assert read_all(open_documents(tmp_path)) == records


def test_broken_lines_are_told_apart(tmp_path):
    deep = b"[" * 100_000
    lines = [
        b'{"text": "ok"}',
        b'{"text": ',
        b'{"text": "\xff\xfe"}',
        b"",
        b"[1, 2]",
        deep,
        b'{"n": ' + b"9" * 9000 + b"}",
    ]
    path = write_lines(tmp_path / "a.jsonl", lines)
    expected = [{"text": "ok"}, "broken_json", "bad_utf8", "empty", "broken_json", "broken_json", "broken_json"]
    assert read_all(open_documents(path)) == expected


def test_documents_above_the_limit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("phi35.data.documents.MAX_DOCUMENT_BYTES", 100)
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 200}, {"text": "y"}])
    (tmp_path / "b.txt").write_text("z" * 101)
    tar_of(tmp_path / "c.tar", [("big.txt", b"t" * 101)])
    assert read_all(open_documents(tmp_path)) == ["too_large", {"text": "y"}, "too_large", "too_large"]


def test_hostile_tars_give_what_is_whole_and_run_nothing(tmp_path):
    link, device, folder = (tarfile.TarInfo(name) for name in ("link.txt", "device.txt", "folder.txt"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type, folder.type = tarfile.CHRTYPE, tarfile.DIRTYPE

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    members = [
        ("../../escape.txt", b"outside"),
        ("sub/../../escape.json", b"{}"),
        (link, b""),
        (device, b""),
        (folder, b""),
        ("weights.pkl", pickle.dumps(Payload())),
        ("good.txt", b"good"),
        (f"pipe:touch {tmp_path}/owned.txt", b"its name is a name"),
        ("url.json", json.dumps({"__url__": "pipe:touch owned", "text": "http://169.254.169.254/"}).encode()),
    ]
    tar_of(tmp_path / "a.tar", members)
    documents = open_documents(tmp_path)
    url = {"__url__": "pipe:touch owned", "text": "http://169.254.169.254/"}
    assert read_all(documents) == ["good", "its name is a name", url]
    assert documents.left_out == {"foreign_member": 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_broken_tars_are_counted(tmp_path):
    whole = tar_of(tmp_path / "a.tar", [("1.txt", b"one"), ("2.txt", b"t" * 3000)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2000])
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    bomb = bytearray(tar_of(tmp_path / "d.tar", [("L" * 200 + ".txt", b"x")]).read_bytes())
    assert bomb[156:157] == b"x"  # a pax header, whose size is now said to be 8 GB
    bomb[124:136] = b"77777777777\0"
    checksum = sum(bomb[:148]) + 8 * 32 + sum(bomb[156:512])
    bomb[148:156] = f"{checksum:06o}\0 ".encode()
    (tmp_path / "d.tar").write_bytes(bytes(bomb))
    documents = open_documents(tmp_path)
    assert read_all(documents) == ["one"]
    assert documents.left_out == {"truncated_shard": 1, "unreadable_shard": 3}


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "inside.txt").write_text("inside")
    (data / "out.txt").symlink_to(secret)
    (data / "in.txt").symlink_to(data / "inside.txt")
    documents = open_documents(data)
    assert read_all(documents) == ["inside", "inside"]
    assert documents.left_out == {"outside_link": 1}


@pytest.mark.parametrize("data", ["pipe:cat x", "http://127.0.0.1/a.jsonl", "s3://bucket/x", "file:///etc/passwd"])
def test_commands_and_urls_are_refused(data):
    with pytest.raises(ValueError, match="local files only"):
        open_documents(data)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert read_all(open_documents(tmp_path)) == [{"text": "one"}, {"text": "two"}, "three"]


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read_all(open_documents(tmp_path)) == ["bad_utf8"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no file"):
        open_documents(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="ends in none of"):
        open_documents(tmp_path / "a.csv")


def test_the_interpreters_own_library_is_at_hand():
    files = document_files("stdlib")
    assert len(files) > 100 and all(path.suffix == ".py" for path in files)
    assert files == sorted(files) and not any("site-packages" in path.parts for path in files)
