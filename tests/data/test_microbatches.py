"""Microbatches: every row once, dealt in turn, and what a plain count says of their load."""

from __future__ import annotations

import numpy as np
import pytest

from minillm.data.microbatches import (
    Load,
    Microbatches,
    by_positions,
    even_cuts,
    in_blocks,
    in_turn,
    load_of,
)


def some_lengths(low: int, high: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Return random lengths from `low` to `high` - 1."""
    return np.random.default_rng(4).integers(low, high, shape)


def shares(cut: Microbatches) -> list[list[list[int]]]:
    """Return the rows of each microbatch of each rank."""
    ranks = range(cut.grid.shape[1])
    return [[cut.rows(rank, m).tolist() for m in range(cut.number)] for rank in ranks]


def test_rows_of_equal_batches() -> None:
    assert shares(in_blocks(8, 2, 2)) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert shares(in_turn(8, 2, 2)) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def plain_load(lengths: np.ndarray, ranks: int, microbatches: int) -> Load:
    work = []
    for rank in range(ranks):
        own, total = lengths[rank::ranks], 0
        size = len(own) // microbatches
        for m in range(microbatches):
            part = own[m * size : (m + 1) * size]
            for k in range(lengths.shape[1]):
                total += size * max(1, max(part[:, k]))
        work.append(total)
    balance = max(work) / (sum(work) / ranks)
    return Load(int(lengths.sum()), sum(work), balance, len(lengths))


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (4, 1), (2, 4), (3, 2)])
def test_load_is_what_a_plain_count_gives(ranks: int, microbatches: int) -> None:
    for parts in (1, 2):
        lengths = np.sort(some_lengths(0, 50, (48, parts)), axis=0)
        found = load_of(lengths, in_turn(48, ranks, microbatches))
        expected = plain_load(lengths, ranks, microbatches)
        assert (found.real, found.computed, found.sequences) == (*expected[:2], 48)
        assert abs(found.balance - expected.balance) < 1e-12


def test_a_row_too_many_is_load_of_one_rank() -> None:
    cut = by_positions(np.array([2, 3, 5]), 2, 1, 0)
    assert shares(cut) == [[[1]], [[0, 2]]]
    assert load_of(np.array([[2], [3], [5]]), cut) == Load(10, 13, 10 / 6.5, 3)


@pytest.mark.parametrize("size", [1, 2, 7, 40, 333])
@pytest.mark.parametrize(("ranks", "least"), [(1, 1), (1, 4), (3, 1), (4, 4), (8, 2)])
@pytest.mark.parametrize("most", [0, 40, 150, 1000])
def test_microbatches_by_positions(size: int, ranks: int, least: int, most: int) -> None:
    sizes = np.sort(some_lengths(1, 60, size))
    cut = by_positions(sizes, ranks, least, most)
    rows = [row for share in shares(cut) for part in share for row in part]
    assert sorted(rows) == list(range(size))
    turns = -(-size // ranks)
    assert min(least, turns) <= cut.number <= turns
    for m in range(cut.number):
        parts = [cut.rows(rank, m) for rank in range(ranks)]
        assert any(map(len, parts))
        for part in parts:
            if most and len(part) > 1:
                assert len(part) * sizes[part].max() <= most
    of_parts = (np.concatenate([share[m] for share in shares(cut)]) for m in range(cut.number))
    tokens = [int(sizes[part.astype(int)].sum()) for part in of_parts]
    if size > 100 and not most:  # like many tokens: as the mean, to a turn's
        assert max(tokens) - min(tokens) <= 2 * 60 * ranks


def test_as_few_microbatches_as_the_limit_allows() -> None:
    sizes = np.full(12, 10)
    for most, number in ((120, 1), (119, 2), (60, 2), (59, 3), (10, 12), (3, 12)):
        assert by_positions(sizes, 1, 1, most).number == number
    assert by_positions(sizes, 4, 1, 30).number == 1
    assert by_positions(sizes, 4, 1, 29).number == 2


@pytest.mark.parametrize("number", [1, 2, 5, 30])
def test_cuts_are_even_and_leave_no_part_empty(number: int) -> None:
    rng = np.random.default_rng(number)
    for _ in range(50):
        sizes = rng.integers(1, 40, rng.integers(number, 200))
        ends = even_cuts(sizes, number)
        assert ends[0] == 0 and ends[-1] == len(sizes) and (np.diff(ends) > 0).all()
        if sizes.sum() >= 2 * 40 * number:
            parts = np.add.reduceat(sizes, ends[:-1])
            assert abs(parts - sizes.sum() / number).max() < 40 + 1
    assert even_cuts(np.array([10, 1]), 2).tolist() == [0, 1, 2]
    assert even_cuts(np.array([1, 1, 50]), 3).tolist() == [0, 1, 2, 3]
    assert even_cuts(np.array([50, 1, 1]), 3).tolist() == [0, 1, 2, 3]
