import itertools

import numpy as np
import pytest

from saex_pipe.common.shuffle import RowOrder

ROWS_PER_CHUNK = np.random.Generator(np.random.Philox(key=1)).integers(0, 40, 50)


def row_ids(order, step, batch_rows):
    """Every row of a batch as (chunk, row within chunk), found through the public description of pools."""
    found = []
    for part in order.span(step * batch_rows, (step + 1) * batch_rows):
        stream = [(c.chunk, row) for c in order.chunks(part.pool) for row in range(c.first, c.last)]
        found += [stream[i] for i in order.dealt(part)]
    return found


@pytest.mark.parametrize(("lanes", "pool_rows"), [(1, 10_000), (8, 37), (3, 1), (8, 10_000)])
def test_every_row_comes_exactly_once_an_epoch(lanes, pool_rows):
    order = RowOrder(ROWS_PER_CHUNK, seed=3, pool_rows=pool_rows, lanes=lanes)
    every = {(chunk, row) for chunk, rows in enumerate(ROWS_PER_CHUNK) for row in range(rows)}
    epochs, batch_rows = 3, 7
    steps = -(-epochs * order.rows // batch_rows)
    seen = [row for step in range(steps) for row in row_ids(order, step, batch_rows)]
    # A batch is ordered by epoch, so cutting the sequence by epoch length is exact at epoch ends.
    for epoch in range(epochs):
        part = seen[epoch * order.rows : (epoch + 1) * order.rows]
        assert len(part) == len(every)
        assert set(part) == every


def test_epochs_differ_and_seeds_differ():
    order = RowOrder(ROWS_PER_CHUNK, seed=3, pool_rows=64)
    first = row_ids(order, 0, order.rows)
    assert first != row_ids(order, 1, order.rows)
    assert first != row_ids(RowOrder(ROWS_PER_CHUNK, seed=4, pool_rows=64), 0, order.rows)
    assert first == row_ids(RowOrder(ROWS_PER_CHUNK, seed=3, pool_rows=64), 0, order.rows)


def test_any_step_is_found_without_the_steps_before_it():
    steps = [row_ids(RowOrder(ROWS_PER_CHUNK, seed=0, pool_rows=50), step, 16) for step in range(40)]
    assert row_ids(RowOrder(ROWS_PER_CHUNK, seed=0, pool_rows=50), 31, 16) == steps[31]


def test_batches_draw_evenly_from_the_lanes():
    order = RowOrder(np.full(64, 32), seed=0, pool_rows=64, lanes=8)
    sizes = [len(part.turns) for part in order.span(5 * 64, 6 * 64)]
    assert sizes == [8] * 8


def test_the_next_pool_is_the_one_used_next_in_its_lane():
    order = RowOrder(ROWS_PER_CHUNK, seed=5, pool_rows=20, lanes=2)
    batch_rows = 10
    steps = 2 * order.rows // batch_rows
    per_lane = {}
    for step in range(steps):
        for part in order.span(step * batch_rows, (step + 1) * batch_rows):
            lane = part.pool.start >= order.rows - order.rows // 2
            sequence = per_lane.setdefault(lane, [])
            if not sequence or sequence[-1] != part.pool:
                sequence.append(part.pool)
    for sequence in per_lane.values():
        assert len(sequence) > 10
        assert all(order.next_pool(a) == b for a, b in itertools.pairwise(sequence))


def test_lanes_change_pools_one_after_the_other():
    order = RowOrder(np.full(640, 32), seed=0, pool_rows=640, lanes=8)
    used, changes = {}, []
    for step in range(order.rows // 64):
        pools = {part.pool.start * 8 // order.rows: part.pool for part in order.span(step * 64, (step + 1) * 64)}
        changes.append(sum(used.get(lane, pool) != pool for lane, pool in pools.items()))
        used |= pools
    assert max(changes) == 1
    assert sum(changes) == 8 * 4 - 1, "four pools a lane, and one more where the first is cut short"


def test_neighbours_in_the_store_are_spread_as_by_a_perfect_shuffle():
    """Share of pairs in a batch from one chunk, against the expectation of drawing without replacement."""
    order = RowOrder(np.full(256, 64), seed=0, pool_rows=1 << 20, lanes=8)
    batch_rows = 512
    expected = batch_rows * 63 / (order.rows - 1)
    same = []
    for step in range(8):
        chunk = np.array([c for c, _ in row_ids(order, step, batch_rows)])
        counts = np.bincount(chunk)
        same.append((counts * (counts - 1)).sum() / batch_rows)
    assert np.mean(same) == pytest.approx(expected, rel=0.05)
