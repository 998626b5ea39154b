"""Merges of byte-pair encoding: every implementation against the plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from minillm.kernels import registry
from minillm.kernels.subwords import reference

from minillm import kernels

RUNNABLE = [k for k in registry.available("merge_pairs") if k.unavailable is None]


def table(rng: np.random.Generator, letters: int, number: int) -> tuple[np.ndarray, ...]:
    """Return random merges of some letters and of the tokens that they make."""
    ranks: dict[int, int] = {}
    merged: list[int] = []
    for rank in range(number):
        left, right = rng.integers(0, letters + rank, 2).tolist()
        ranks[(left << 32) + right] = rank
        # A token in eight has been made before from another pair.
        again = merged and rng.random() < 0.125
        merged.append(int(rng.choice(merged)) if again else letters + rank)
    pairs = np.array(sorted(ranks), np.uint64)
    order = np.array([ranks[pair] for pair in sorted(ranks)], np.uint32)
    return pairs, order, np.array(merged, np.uint32)


@pytest.mark.parametrize("entry", RUNNABLE, ids=lambda entry: entry.choice)
def test_merges_are_those_of_the_definition(entry: registry.Kernel) -> None:
    rng = np.random.default_rng(3)
    changed = 0
    for letters in (2, 3, 26):
        merges = table(rng, letters, 40)
        sizes = rng.integers(0, 30, 200)
        ids = rng.integers(0, letters, sizes.sum()).astype(np.uint32)
        found = entry.fn(ids, np.cumsum(sizes), *merges)
        expected = reference.merge_pairs(ids, np.cumsum(sizes), *merges)
        for ours, plain in zip(found, expected, strict=True):
            assert ours.dtype == plain.dtype and np.array_equal(ours, plain)
        changed += len(ids) - len(expected[0])
    assert changed > 1000


@pytest.mark.parametrize("entry", RUNNABLE, ids=lambda entry: entry.choice)
def test_no_words_and_no_merges(entry: registry.Kernel) -> None:
    none = np.empty(0, np.uint32)
    ids, ends = entry.fn(none, np.empty(0, np.int64), np.empty(0, np.uint64), none, none)
    assert len(ids) == len(ends) == 0
    word = np.arange(5, dtype=np.uint32)
    ids, ends = entry.fn(word, np.array([0, 5]), np.empty(0, np.uint64), none, none)
    assert ids.tolist() == [0, 1, 2, 3, 4] and ends.tolist() == [0, 5]


def test_a_long_word_takes_n_log_n() -> None:
    """Merge a run of 200,000 equal letters, which the plain definition would take hours for."""
    pairs = np.array([0, (1 << 32) + 1], np.uint64)
    ids, ends = kernels.merge_pairs(
        np.zeros(200_000, np.uint32),
        np.array([200_000]),
        pairs,
        np.array([0, 1], np.uint32),
        np.array([1, 2], np.uint32),
    )
    assert ids.tolist() == [2] * 50_000 and ends.tolist() == [50_000]
