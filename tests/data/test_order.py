import numpy as np
import pytest

from llmtrain.data.order import rank_share, shuffled, step_sequences


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_the_order_is_a_permutation(n):
    assert sorted(shuffled(np.arange(n), n, key=7)) == list(range(n))


def test_huge_corpora_are_shuffled_in_constant_memory():
    n = 2**61 + 12_345
    taken = shuffled(np.arange(1000) + n - 1000, n, key=3)
    assert len(set(taken.tolist())) == 1000
    assert taken.min() >= 0
    assert taken.max() < n


def test_neighbours_are_spread_evenly():
    n = 100_000
    taken = shuffled(np.arange(n // 10), n, key=1)
    counts, _ = np.histogram(taken, bins=10, range=(0, n))
    assert counts.min() > 900  # of 1000 expected, three standard deviations below


def test_another_key_is_another_order():
    assert (shuffled(np.arange(1000), 1000, 1) != shuffled(np.arange(1000), 1000, 2)).mean() > 0.9


def test_an_epoch_visits_every_sequence_once_and_the_next_in_another_order():
    steps = [
        step_sequences(seed=0, step=step, global_batch=8, num_sequences=20) for step in range(5)
    ]
    visited = np.concatenate(steps)
    first, second = visited[:20], visited[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()


def test_the_order_depends_on_the_seed_and_the_step_alone():
    once = step_sequences(seed=0, step=7, global_batch=64, num_sequences=10_000)
    again = step_sequences(seed=0, step=7, global_batch=64, num_sequences=10_000)
    assert once.tolist() == again.tolist()
    assert once.tolist() != step_sequences(1, 7, 64, 10_000).tolist()


def test_the_order_never_changes_between_releases():
    assert step_sequences(seed=0, step=3, global_batch=4, num_sequences=1000).tolist() == [
        739,
        479,
        862,
        160,
    ]


def test_a_batch_larger_than_the_corpus_goes_through_it_several_times():
    counts = np.bincount(step_sequences(seed=0, step=0, global_batch=30, num_sequences=10))
    assert counts.tolist() == [3] * 10


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_any_number_of_ranks_trains_on_the_same_sequences(micro_batch):
    indices = step_sequences(seed=5, step=11, global_batch=16, num_sequences=1000)
    for world_size in (1, 2, 4):
        shares = [rank_share(indices, rank, world_size, micro_batch) for rank in range(world_size)]
        assert {share.shape for share in shares} == {(16 // world_size // micro_batch, micro_batch)}
        assert sorted(np.concatenate(shares, axis=None)) == sorted(indices)
