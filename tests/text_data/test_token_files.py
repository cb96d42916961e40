"""Token files: what is written is read, in every form, and what contradicts itself is refused."""

import json
import struct

import numpy as np
import pytest
from text_data import chat, small_processor, write_lines

from phi35.data.documents import open_documents
from phi35.data.encoding import ChatEncoder, TextEncoder, tokenizer_identity
from phi35.data.prepare import prepare_tokens
from phi35.data.token_files import check_files, is_token_data, open_tokens

EOT = 1000


def prepared(tmp_path, kind="chat", **options):
    """Nine chats (or texts) in a token folder, and their encodings."""
    if kind == "chat":
        records = [chat("q" * number, "answer " * number) for number in range(1, 10)]
        encoder = ChatEncoder(small_processor().tokenizer)
    else:
        records = [{"text": "word " * number} for number in range(1, 10)]
        encoder = TextEncoder(small_processor().tokenizer, EOT)
    documents = open_documents(write_lines(tmp_path / "data" / "a.jsonl", records))
    options = {"vocab_size": 1088, "show_progress": False, **options}
    index = prepare_tokens(documents, encoder, tmp_path / "tokens", **options)
    return index, [encoder(record) for record in records]


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("tokens_per_part, vocab_size", [(2**27, 1088), (1, 100_000)])
def test_documents_come_back_token_by_token(tmp_path, monkeypatch, kind, tokens_per_part, vocab_size):
    monkeypatch.setattr("phi35.data.prepare.DOCUMENTS_PER_CHUNK", 2)
    index, expected = prepared(tmp_path, kind, tokens_per_part=tokens_per_part, vocab_size=vocab_size)
    assert len(index["parts"]) == (1 if tokens_per_part > 1 else 5)
    assert index["dtype"] == ("uint16" if vocab_size == 1088 else "uint32")
    files = open_tokens(tmp_path / "tokens", end_of_text=EOT, verify=True)
    assert len(files) == 9 and files.kind == kind and files.num_tokens == sum(len(one.ids) for one in expected)
    for number, one in enumerate(expected):
        assert files.length(number) == len(one.ids)
        for start, stop in ((0, len(one.ids)), (1, len(one.ids) - 1), (3, 5)):
            ids, trained = files.read(number, start, stop)
            assert ids.dtype == np.int64 and ids.tolist() == one.ids[start:stop].tolist()
            if kind == "chat":
                assert trained.tolist() == one.trained[start:stop].tolist()
            else:
                assert trained is None


def test_bits_of_every_offset_are_read(tmp_path):
    trained = np.random.default_rng(0).random(100) < 0.5
    from text_data import numbered_tokens

    files = numbered_tokens([40, 0, 60], trained=trained, kind="chat")
    for start in range(60):
        for stop in (start + 1, 60):
            ids, learned = files.read(2, start, stop)
            assert ids.tolist() == list(range(40 + start, 40 + stop))
            assert learned.tolist() == trained[40 + start : 40 + stop].tolist()


def test_one_file_of_tokens_is_cut_behind_each_end_of_text(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 6, EOT, 7, EOT, EOT, 8, 9], dtype=np.uint16))
    files = open_tokens(tmp_path / "a.npy", end_of_text=EOT)
    assert [files.read(number, 0, files.length(number))[0].tolist() for number in range(4)] == [
        [5, 6, EOT],
        [7, EOT],
        [EOT],
        [8, 9],
    ]


def megatron(folder, documents, dtype=np.int32, code=4):
    """A pair of files in Megatron-LM's form; a document is a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    data = np.concatenate([np.array(sequence, dtype=dtype) for sequence in sequences])
    data.tofile(folder / "m.bin")
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    pointers = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype("<i8") * np.dtype(dtype).itemsize
    bounds = np.cumsum([0, *[len(document) for document in documents]]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    (folder / "m.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())


@pytest.mark.parametrize("dtype, code", [(np.int32, 4), (np.uint16, 8)])
@pytest.mark.parametrize("name", ["m.bin", "m.idx"])
def test_megatron_pairs_are_read(tmp_path, dtype, code, name):
    megatron(tmp_path, [[[1, 2, 3]], [[4], [5, 6]], [[7, 8]]], dtype, code)
    files = open_tokens(tmp_path / name, end_of_text=EOT)
    found = [files.read(number, 0, files.length(number))[0].tolist() for number in range(len(files))]
    assert found == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_megatron_pairs_that_contradict_themselves_are_refused(tmp_path):
    megatron(tmp_path, [[[1, 2, 3]], [[4]]])
    index = (tmp_path / "m.idx").read_bytes()
    for bad in (index[:-9], b"x" + index[1:], index[:34] + struct.pack("<i", 99) + index[38:], index[:20]):
        (tmp_path / "m.idx").write_bytes(bad)
        with pytest.raises(ValueError, match=r"m\.idx"):
            open_tokens(tmp_path / "m.bin", end_of_text=EOT)
    (tmp_path / "m.idx").unlink()
    with pytest.raises(ValueError, match=r"needs the file 'm\.idx'"):
        open_tokens(tmp_path / "m.bin", end_of_text=EOT)


def test_a_changed_byte_is_named_where_sums_are_compared(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "tokens" / "part-00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    open_tokens(tmp_path / "tokens", end_of_text=EOT)
    with pytest.raises(ValueError, match=r"part-00000\.tokens\.npy has another SHA-256"):
        open_tokens(tmp_path / "tokens", end_of_text=EOT, verify=True)
    path.write_bytes(bytes(content[:-2]))
    with pytest.raises(ValueError, match=r"part-00000\.tokens\.npy has \d+ bytes instead of \d+"):
        check_files(tmp_path / "tokens", verify=False)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        check_files(tmp_path / "tokens", verify=False)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    index, _ = prepared(tmp_path)
    entry = index["parts"][0]["files"]
    entry["../../secret"] = next(iter(entry.values()))
    (tmp_path / "tokens" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no plain file name"):
        open_tokens(tmp_path / "tokens", end_of_text=EOT)


def test_pickles_are_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no array of numbers"):
        open_tokens(tmp_path / "a.npy", end_of_text=EOT)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(ValueError, match="whole numbers, got float64"):
        open_tokens(tmp_path / "b.npy", end_of_text=EOT)
    (tmp_path / "c.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="no array"):
        open_tokens(tmp_path / "c.npy", end_of_text=EOT)


@pytest.mark.parametrize("offsets", [[0, 5], [1, 6], [0, 4, 3, 6], []])
def test_offsets_that_contradict_the_tokens_are_refused(offsets):
    from phi35.data.token_files import TokenFiles, TokenPart

    with pytest.raises(ValueError, match="do not ascend"):
        TokenFiles([TokenPart(np.arange(6), np.array(offsets, dtype=np.int64))])


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    prepared(tmp_path)
    mine = tokenizer_identity(small_processor().tokenizer)
    assert len(open_tokens(tmp_path / "tokens", end_of_text=EOT, tokenizer=mine)) == 9
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        open_tokens(tmp_path / "tokens", end_of_text=EOT, tokenizer="of another model")


def test_only_finished_folders_count(tmp_path):
    (tmp_path / "tokens").mkdir()
    assert not is_token_data(tmp_path / "tokens") and not is_token_data(tmp_path / "nowhere.npy")
    prepared(tmp_path)
    assert is_token_data(tmp_path / "tokens")
    (tmp_path / "tokens" / "index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format is 99"):
        open_tokens(tmp_path / "tokens", end_of_text=EOT)
