"""The stream of rows: fixed by data and seed for any number of ranks, resumable anywhere, mixed by weight."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from text_data import numbered_tokens, packed_source

from phi35.data.order import Shuffle
from phi35.data.packing import BestFitPacker, ConcatenatingPacker, Piece, build_packer

LENGTHS = [3, 10, 7, 25, 1, 4, 0, 6, 9, 2, 5, 8, 13]


def rows_of(sources, rounds):
    """The rows that all ranks together see, in the order of the global batches, and the state behind them."""
    rows = []
    for batches in itertools.islice(zip(*sources, strict=True), rounds):
        for batch in batches:
            for number in range(len(batch["input_ids"])):
                lengths = [int(size) for size in batch["sequence_lengths"][number] if size]
                rows.append((batch["input_ids"][number].tolist(), batch["labels"][number].tolist(), lengths))
    states = {json.dumps(source.state_dict()) for source in sources}
    assert len(states) == 1
    return rows, json.loads(states.pop())


def ranks(world_size, micro_batch_size, state=None, **options):
    sources = [
        packed_source(
            numbered_tokens(LENGTHS), rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, **options
        )
        for rank in range(world_size)
    ]
    for source in sources:
        if state is not None:
            source.load_state_dict(state)
    return sources


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 1), (1, 4), (3, 2), (4, 3)])
def test_rows_do_not_depend_on_ranks_or_micro_batches(world_size, micro_batch_size, packing):
    expected, _ = rows_of(ranks(1, 1, packing=packing), 36)
    rounds = 36 // (world_size * micro_batch_size)
    assert rows_of(ranks(world_size, micro_batch_size, packing=packing), rounds)[0] == expected


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("cut", [1, 4, 7, 18])
def test_a_position_continues_on_another_number_of_ranks(packing, cut):
    whole, end = rows_of(ranks(1, 1, packing=packing), cut * 2 + 24)
    _, state = rows_of(ranks(2, 1, packing=packing), cut)
    rest, later = rows_of(ranks(3, 2, state, packing=packing), 4)
    assert rest == whole[2 * cut :] and later == end


def test_workers_read_ahead_without_moving_the_position():
    expected, state = rows_of(ranks(1, 2), 3)
    with_workers = ranks(1, 2, num_workers=2)
    assert rows_of(with_workers, 3) == (expected, state)
    assert rows_of(ranks(1, 2, state), 4)[0] == rows_of(ranks(1, 2, with_workers[0].state_dict(), num_workers=1), 4)[0]


def test_iterating_anew_goes_on_behind_the_last_batch_taken():
    (source,) = ranks(1, 1)
    first = [batch["input_ids"].tolist() for batch in itertools.islice(source, 3)]
    second = [batch["input_ids"].tolist() for batch in itertools.islice(source, 3)]
    (other,) = ranks(1, 1)
    assert [batch["input_ids"].tolist() for batch in itertools.islice(other, 6)] == first + second


def test_every_epoch_holds_every_token_once_in_an_order_of_its_own():
    lengths = [length for length in LENGTHS if length > 1]
    total = sum(lengths)
    source = packed_source(numbered_tokens(lengths), packing="concatenate", sequence_length=1, mask_documents=False)
    tokens = [int(batch["input_ids"]) for batch in itertools.islice(source, 3 * total)]
    epochs = [tokens[first : first + total] for first in range(0, 3 * total, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    lying = packed_source(
        numbered_tokens(lengths), packing="concatenate", sequence_length=1, mask_documents=False, shuffle=False
    )
    assert [int(batch["input_ids"]) for batch in itertools.islice(lying, total)] == list(range(total))


def test_a_row_holds_whole_documents_and_says_where_they_lie():
    source = packed_source(numbered_tokens([length for length in LENGTHS if 1 < length <= 10]))
    for batch in itertools.islice(source, 30):
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        first, starts = 0, []
        for size in batch["sequence_lengths"][0].tolist():
            if size:
                piece = ids[first : first + size]
                assert torch.equal(piece, torch.arange(int(piece[0]), int(piece[0]) + size))
                assert labels[first] == -100 and torch.equal(labels[first + 1 : first + size], piece[1:])
                starts.append(int(piece[0]))
                first += size
        assert (ids[first:] == 999_999).all() and (labels[first:] == -100).all()
        if first < 10:
            assert batch["attention_mask"][0].tolist() == [1] * first + [0] * (10 - first)
        assert starts


def test_full_rows_come_without_a_mask():
    batch = next(iter(packed_source(numbered_tokens([10, 10, 10]), micro_batch_size=2)))
    assert set(batch) == {"input_ids", "labels", "sequence_lengths"}
    assert batch["sequence_lengths"].tolist() == [[10], [10]]


def test_long_texts_become_pieces_that_miss_nothing():
    source = packed_source(numbered_tokens([25, 34]), shuffle=False, packing="best_fit", buffer_size=1)
    rows = [batch["input_ids"][0].tolist() for batch in itertools.islice(source, 7)]
    flat = [token for row in rows for token in row if token != 999_999]
    assert flat == list(range(59))


def test_without_kept_apart_documents_a_row_is_one_sample():
    source = packed_source(numbered_tokens([6, 4, 20]), shuffle=False, packing="concatenate", mask_documents=False)
    batch = next(iter(source))
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["input_ids"], torch.arange(10)[None]) and torch.equal(batch["labels"], batch["input_ids"])


def test_sources_are_mixed_by_their_share_of_tokens():
    small, large = numbered_tokens([2, 3, 4] * 5), numbered_tokens([9, 10, 8] * 5, start=1000)
    source = packed_source([small, large], weights=[3.0, 1.0], packing="concatenate", sequence_length=12)
    counted = [0, 0]
    for batch in itertools.islice(source, 200):
        for token in batch["input_ids"][0].tolist():
            counted[token >= 1000] += 1
    # Exact to one document: the source that is behind is always next.
    assert abs(counted[0] - 0.75 * sum(counted)) <= 10 and sum(counted) == 2400


def test_a_mixture_resumes_in_every_source():
    def built(**options):
        files = [numbered_tokens([2, 3, 4] * 5), numbered_tokens([9, 7, 8] * 5, start=1000)]
        return packed_source(files, weights=[1.0, 2.0], **options)

    whole, _ = rows_of([built()], 40)
    one = built()
    rows_of([one], 15)
    other = built(num_workers=1)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert rows_of([other], 25)[0] == whole[15:]


END = 7


def chats():
    """Chats of 8, 14 and 12 tokens; learned are two replies each, which end with token 7."""
    tokens = np.full(34, 50)
    trained = np.zeros(34, dtype=bool)
    for first, replies in ((0, [(2, 4), (6, 8)]), (8, [(3, 6), (10, 13)]), (22, [(4, 12)])):
        for start, stop in replies:
            trained[first + start : first + stop] = True
            tokens[first + stop - 1] = END
    files = numbered_tokens([8, 14, 12], trained=trained, kind="chat", end_token=END)
    files.parts[0].tokens[:] = tokens
    return files


@pytest.mark.parametrize(
    "overlong, counted", [("skip", {"too_long": 2}), ("drop_turns", {"shortened": 1, "too_long": 1})]
)
def test_overlong_chats_end_with_a_whole_reply_or_are_left_out(overlong, counted):
    source = packed_source(chats(), overlong=overlong, shuffle=False, buffer_size=1)
    samples = 1 if overlong == "skip" else 2
    for batch in itertools.islice(source, samples):
        size = int(batch["sequence_lengths"].sum())
        assert size == 8 or (overlong == "drop_turns" and size == 6)
        assert batch["input_ids"][0, size - 1] == END == batch["labels"][0, size - 1]
    assert source.skips() == ({} if overlong == "skip" else {"shortened": 1})
    list(itertools.islice(source, 1))
    assert source.skips() == counted


def test_skips_are_counted_once_over_all_ranks_and_survive_a_resume():
    sources = ranks(2, 1, prepared={"broken_json": 4})
    _, state = rows_of(sources, 12)
    total = sum((Counter(source.skips()) for source in sources), Counter())
    assert sources[1].skips() == {} and total["broken_json"] == 4 and total["empty"] >= 2
    (resumed,) = ranks(1, 1, state, prepared={"broken_json": 4})
    assert resumed.skips() == dict(total)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_tokens_beyond_the_vocabulary_are_neither_fed_nor_learned(num_workers):
    tokens = numbered_tokens([5, 5])
    source = packed_source(tokens, vocab_size=7, pad_token_id=0, shuffle=False, num_workers=num_workers)
    random_state = torch.get_rng_state()
    batch = next(iter(source))
    assert torch.equal(torch.get_rng_state(), random_state)  # a resumed run's dropout depends on it
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3, 4, -100, -100, -100, -100, -100]]
    assert batch["sequence_lengths"].tolist() == [[5, 5]]
    assert source.skips() == {"bad_tokens": 1}


def test_data_without_a_usable_document_is_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match=r"no document of the data can be used.*empty"):
        next(iter(packed_source(numbered_tokens([1, 0, 1]))))
    with pytest.raises(ValueError, match="too_long"):
        next(iter(packed_source(numbered_tokens([50], trained=[True] * 50, kind="chat", end_token=3))))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"sequence_length": 12}, {"packing": "concatenate"}, {"buffer_size": 5}],
)
def test_a_position_of_another_stream_is_refused(changes):
    (source,) = ranks(1, 1)
    state = source.state_dict()
    with pytest.raises(ValueError, match="other data, another order or another packing"):
        packed_source(numbered_tokens(LENGTHS), **changes).load_state_dict(state)
    with pytest.raises(ValueError, match="other data"):
        packed_source(numbered_tokens([*LENGTHS, 4])).load_state_dict(state)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_a_shuffle_is_a_permutation(size):
    shuffle = Shuffle(size, 1, 2)
    order = [shuffle(place) for place in range(size)]
    assert sorted(order) == list(range(size))
    if size >= 10:
        assert order != list(range(size)) and order != [Shuffle(size, 1, 3)(place) for place in range(size)]


def test_a_shuffle_spreads_evenly():
    size, groups = 20_000, 20
    shuffle = Shuffle(size, 7)
    table = np.zeros((groups, groups))
    for place in range(size):
        table[place * groups // size, shuffle(place) * groups // size] += 1
    expected = size / groups**2
    chi_square = float(((table - expected) ** 2 / expected).sum())
    # Of 361 degrees of freedom: mean 361, standard deviation 27. Measured 391.
    assert 260 < chi_square < 470


def naive_best_fit(pieces, length, buffer_size, count):
    """The packer's rule without its data structures."""
    waiting, rows = [], []
    for _ in range(count):
        while len(waiting) < buffer_size:
            waiting.append(next(pieces))
        row = [waiting.pop(0)]
        room = length - row[0].length
        while any(piece.length <= room for piece in waiting):
            best = max((piece for piece in waiting if piece.length <= room), key=lambda piece: piece.length)
            waiting.remove(best)
            row.append(best)
            room -= best.length
        rows.append(tuple(row))
    return rows


def random_pieces(seed=0):
    generator = np.random.default_rng(seed)
    for number in itertools.count():
        yield Piece(0, number, 0, int(min(64, 1 + generator.exponential(20))))


@pytest.mark.parametrize("buffer_size", [1, 2, 16, 64])
def test_best_fit_follows_its_rule(buffer_size):
    packer, pieces = BestFitPacker(64, buffer_size), random_pieces()
    rows = [packer.next_row(pieces) for _ in range(300)]
    assert rows == naive_best_fit(random_pieces(), 64, buffer_size, 300)
    assert all(sum(piece.length for piece in row) <= 64 for row in rows)


def test_best_fit_leaves_little_padding():
    packer, pieces = BestFitPacker(64, 512), random_pieces()
    rows = [packer.next_row(pieces) for _ in range(2000)]
    filled = sum(piece.length for row in rows for piece in row) / (64 * len(rows))
    # Measured 1.0; with a buffer of 16 pieces 0.9935.
    assert filled > 0.998


def test_no_piece_waits_longer_than_the_buffer():
    packer, arrived, row_number = BestFitPacker(64, 16), {}, 0

    def noted():
        for piece in random_pieces():
            arrived[piece.document] = row_number
            yield piece

    pieces, waits = noted(), []
    for row_number in range(2000):
        waits += [row_number - arrived[piece.document] for piece in packer.next_row(pieces)]
    assert 0 <= min(waits) <= max(waits) <= 15


def test_concatenating_cuts_and_continues():
    packer = ConcatenatingPacker(5)
    pieces = iter([Piece(0, 0, 0, 7), Piece(0, 1, 2, 6), Piece(0, 2, 0, 9)])
    rows = [packer.next_row(pieces) for _ in range(3)]
    assert rows == [
        (Piece(0, 0, 0, 5),),
        (Piece(0, 0, 5, 7), Piece(0, 1, 2, 5)),
        (Piece(0, 1, 5, 6), Piece(0, 2, 0, 4)),
    ]
    assert packer.state_dict() == [[0, 2, 4, 9]]


def test_unknown_packings_are_refused():
    with pytest.raises(ValueError, match="best_fit.*got 'worst_fit'"):
        build_packer("worst_fit", 8, 4)
    with pytest.raises(ValueError, match="buffer_size"):
        build_packer("best_fit", 8, 0)
