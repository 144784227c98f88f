"""The order of samples: a function of seed, epoch and step that ranks only divide."""

import numpy as np
import pytest

from pipeline.data.order import SHUFFLE_WINDOW, BatchPlan, EvaluationPlan, epoch_order, generator

SIZES = (50, 31, 19)


def plan(rank=0, world_size=1, accumulation=1, global_batch=12, seed=5, sizes=SIZES):
    return BatchPlan(sum(sizes), global_batch, accumulation, rank, world_size, seed, sizes)


def global_order(world_size, accumulation, epoch):
    """Samples by optimizer step and place, put together from all ranks."""
    placed = {}
    for rank in range(world_size):
        part = plan(rank, world_size, accumulation)
        for step in range(part.steps_per_epoch):
            samples, rows, optimizer_step = part.rows(epoch, step)
            for sample, row in zip(samples.tolist(), rows.tolist(), strict=True):
                assert (optimizer_step, row) not in placed
                placed[optimizer_step, row] = sample
    return [placed[place] for place in sorted(placed)]


def test_an_epoch_visits_samples_at_most_once_and_drops_only_the_remainder():
    visited = global_order(1, 1, epoch=0)
    assert len(visited) == 96
    assert len(set(visited)) == 96
    assert set(visited) <= set(range(100))
    assert visited != sorted(visited)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_global_order_does_not_depend_on_ranks_or_accumulation(world_size, accumulation):
    for epoch in (0, 1):
        assert global_order(world_size, accumulation, epoch) == global_order(1, 1, epoch)


def test_micro_batches_are_contiguous_pieces_in_order_of_step_then_rank():
    rows = [plan(rank, 2, 3).rows(0, step).rows for step in range(3) for rank in range(2)]
    assert np.concatenate(rows).tolist() == list(range(12))


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    first = epoch_order(SIZES, 5, 0)
    epoch_order.cache_clear()
    assert np.array_equal(first, epoch_order(SIZES, 5, 0))
    assert not np.array_equal(first, epoch_order(SIZES, 5, 1))
    assert not np.array_equal(first, epoch_order(SIZES, 6, 0))


def test_the_recorded_order_stays():
    """A run can only be resumed with the order that it began with."""
    assert epoch_order((8, 4), 0, 0).tolist() == [3, 2, 8, 7, 4, 11, 0, 10, 5, 9, 6, 1]


def test_shuffling_stays_within_neighbouring_shards_and_mixes_them():
    size = SHUFFLE_WINDOW // 2
    order = epoch_order((size,) * 6, 0, 0)
    shards = order.reshape(3, -1) // size
    assert all(len(set(window)) == 2 for window in shards.tolist())
    assert sorted(order.tolist()) == list(range(6 * size))
    # Of neighbours in a well mixed pair of equal shards, half come from different ones.
    assert 0.45 < np.mean(shards[:, 1:] != shards[:, :-1]) < 0.55


def test_repeated_visits_keep_to_the_shard_that_is_read():
    size = SHUFFLE_WINDOW
    repeated = BatchPlan(2 * size, 4 * size, 1, 0, 1, 0, (size, size), repeats=2)
    windows = repeated.rows(0, 0).samples.reshape(4, size)
    assert sorted(int(window[0]) // size for window in windows) == [0, 0, 1, 1]
    for window in windows:
        first = window.min()
        assert np.array_equal(np.sort(window), np.arange(first, first + size))


def test_the_order_of_shards_changes():
    size = SHUFFLE_WINDOW
    firsts = {int(epoch_order((size,) * 4, 0, epoch)[0]) // size for epoch in range(20)}
    assert firsts == {0, 1, 2, 3}


def test_streams_of_different_purpose_or_position_differ():
    streams = [("a",), ("b",), ("a", 0), ("a", 0, 0), ("a", 1), ("aa",)]
    draws = {generator(0, *stream).random() for stream in streams}
    assert len(draws) == len(streams)


def test_an_indivisible_batch_is_refused_with_a_batch_that_works():
    with pytest.raises(ValueError, match=r"12 cannot.*5 ranks x 1.*multiple of 5, such as 15"):
        plan(world_size=5)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="batch of 101 exceeds the 100 training samples"):
        plan(global_batch=101)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 70])
def test_evaluation_covers_the_set_once_in_order(world_size):
    visited = []
    for rank in range(world_size):
        part = EvaluationPlan(64, 7, rank, world_size)
        samples = [part.rows(0, step).samples for step in range(part.steps_per_epoch)]
        assert sum(map(len, samples)) == part.samples
        assert all(len(batch) == 7 for batch in samples[:-1])
        visited += [int(sample) for batch in samples for sample in batch]
    assert visited == list(range(64))
