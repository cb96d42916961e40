"""The order of samples: epochs, stretches of shards, mixtures; all of it from seed and position alone."""

from collections import Counter

import numpy as np
import pytest

from vision.sample_order import EpochOrder, Mixture

DRAWS = np.array([1, 2, 0, 1, 3, 1, 1, 0, 1, 2])
SHARDS = [4, 0, 3, 3]


def visits(order: EpochOrder, epoch: int) -> list[int]:
    return [order(epoch, place) for place in range(len(order))]


@pytest.mark.parametrize("stretch", [None, 1, 3, 5, 100])
def test_every_epoch_visits_each_sample_its_draws(stretch: int | None) -> None:
    order = EpochOrder(DRAWS, SHARDS, seed=3, stretch=stretch)
    assert len(order) == DRAWS.sum()
    epochs = [visits(order, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert Counter(epoch) == {number: draws for number, draws in enumerate(DRAWS.tolist()) if draws}
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # any place may be asked for, in any order, by any process
    other = EpochOrder(DRAWS, SHARDS, seed=3, stretch=stretch)
    assert [other(2, place) for place in reversed(range(len(order)))] == epochs[2][::-1]
    assert visits(EpochOrder(DRAWS, SHARDS, seed=4, stretch=stretch), 0) != epochs[0] or stretch == 1


def test_without_shuffling_samples_come_as_they_lie() -> None:
    order = EpochOrder(DRAWS, SHARDS, seed=0, shuffle=False)
    assert visits(order, 5) == np.repeat(np.arange(10), DRAWS).tolist()


def test_a_stretch_reads_few_shards_and_shuffles_within() -> None:
    draws, shards = np.ones(1000, dtype=np.int64), [10] * 100
    order = EpochOrder(draws, shards, seed=0, stretch=50)
    epoch = np.array(visits(order, 0))
    for start in range(0, 1000, 50):
        stretch = epoch[start : start + 50]
        assert len(set(stretch // 10)) == 5  # five whole shards
        assert stretch.tolist() != sorted(stretch)
    firsts = [tuple(sorted(set(epoch[start : start + 50] // 10))) for start in range(0, 1000, 50)]
    assert any(shards[-1] - shards[0] > 20 for shards in firsts)  # the shards too are in another order


def test_the_whole_epoch_is_shuffled_evenly() -> None:
    order = EpochOrder(np.ones(200, dtype=np.int64), [100, 100], seed=0)
    means = [np.mean(visits(order, epoch)[:50]) for epoch in range(50)]
    # the mean of 50 of 200 numbers deviates by 7.1, that of fifty such means by 1.0
    assert abs(np.mean(means) - 99.5) < 4
    assert 4 < np.std(means) < 11


def test_a_mixture_holds_its_weights_exactly_and_walks_each_data_set_in_order() -> None:
    mixture = Mixture([5, 3, 2], seed=1)
    seen = [mixture(position) for position in range(2 * Mixture.BLOCK)]
    for block in range(2):
        counted = Counter(source for source, _ in seen[block * Mixture.BLOCK : (block + 1) * Mixture.BLOCK])
        assert counted == {0: 5000, 1: 3000, 2: 2000}
    for source, total in ((0, 10000), (1, 6000), (2, 4000)):
        assert [place for which, place in seen if which == source] == list(range(total))
    runs = Counter(source for source, _ in seen[:1000])
    assert all(abs(runs[source] - share) < 75 for source, share in ((0, 500), (1, 300), (2, 200)))  # five deviations
    again = Mixture([5, 3, 2], seed=1)
    assert [again(position) for position in (15_000, 3, 19_999)] == [seen[15_000], seen[3], seen[19_999]]
    assert [Mixture([5, 3, 2], seed=2)(position)[0] for position in range(50)] != [source for source, _ in seen[:50]]


def test_rare_data_sets_are_not_lost_and_bad_weights_are_refused() -> None:
    mixture = Mixture([1.0, 1e-9, 1 / 3], seed=0)
    counted = Counter(mixture(position)[0] for position in range(Mixture.BLOCK))
    assert counted[1] == 1 and sum(counted.values()) == Mixture.BLOCK
    assert abs(counted[0] - 7500) <= 1
    assert Mixture([2.5], seed=0)(123_456) == (0, 123_456)
    for weights in ([], [1, 0], [1, -1], [float("nan")], [float("inf"), 1], [1.0] * 5000):
        with pytest.raises(ValueError, match="mixture"):
            Mixture(weights, seed=0)
    with pytest.raises(ValueError, match="stretch"):
        EpochOrder(DRAWS, SHARDS, seed=0, stretch=0)
    with pytest.raises(ValueError, match="without samples"):
        EpochOrder(np.zeros(3, dtype=np.int64), [3], seed=0)
