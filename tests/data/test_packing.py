"""Packed sequences are blind for one another, and give the loss of padded ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from minillm.kernels.attention.reference import visible_keys
from training_helpers import BASE, VOCAB, Layout, Outcome, assert_same, train

from minillm.base.device import Device
from minillm.data.batches import IGNORE_INDEX
from minillm.data.packing import Packing
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where

RNG = np.random.default_rng(6)
SIZE = BASE["context"]
LENGTHS = RNG.integers(1, SIZE // 2, BASE["batch"])
DOCUMENTS = [RNG.integers(0, VOCAB, n + 1) for n in LENGTHS]


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_sees_the_keys_of_its_own_sequence(causal: bool) -> None:
    found = Packing(LENGTHS, SIZE)
    seen, times = found.limits().visibility(causal), found.times()
    assert found.limits().visibility(True).causal
    assert len(times) == -(-LENGTHS.sum() // SIZE)  # as few rows as there can be, for these
    taken = np.zeros(times.shape, int)
    for row, start, length in zip(found.rows, found.starts, LENGTHS, strict=True):
        taken[row, start : start + length] += 1
        for i in range(length):
            keys = visible_keys(seen, row, start + i, SIZE).tolist()
            assert keys == list(range(start, start + (i + 1 if causal else length)))
            assert times[row, start + i] == i
    assert taken.max() == 1  # none overlaps another


def test_no_sequence_makes_no_row() -> None:
    found = Packing(np.empty(0, np.int64), 8)
    assert found.fill([], 0).shape == (0, 8) == found.times().shape


class Documents:
    """Language modelling on one batch of documents, each in a row of its own or all packed."""

    losses = ("loss",)

    def __init__(self, packed: bool, seen: bool = False) -> None:
        self.packed, self.seen = packed, seen

    def batch(self, step: int, rows: np.ndarray, device: Device) -> Batch:
        lengths = LENGTHS[rows]
        # Unpacked, a sequence fills its row: the keys behind it are hidden by causality.
        packing = Packing(lengths if self.packed else np.full(len(rows), SIZE), SIZE)
        short = [DOCUMENTS[row] for row in rows]
        if not self.packed:
            packing.rows[:], packing.lengths = np.arange(len(rows)), lengths
        tokens = packing.fill([each[:-1] for each in short], 0)
        targets = packing.fill([each[1:] for each in short], IGNORE_INDEX)
        where = Where(step, np.arange(len(tokens)), packing.times(), device=device)
        limits = KeyLimits() if self.seen else packing.limits()
        divisors = {"loss": float(LENGTHS.sum())}
        return Batch({"tokens": tokens, "targets": targets}, divisors, where, limits)


def run(layout: Layout, **kind: bool) -> Outcome:
    task: Any = Documents(**kind)
    return train("gpt2", layout, steps=2, options={"task": task}, dropout=0.0)


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return run(Layout(), packed=False)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2)], ids=str
)
def test_packed_rows_give_the_loss_of_padded_ones(layout: Layout, alone: Outcome) -> None:
    assert_same(run(layout, packed=True), alone, 1e-8)


def test_sequences_that_see_each_other_are_noticed(alone: Outcome) -> None:
    """Plant the usual bug: packed rows without limits."""
    with pytest.raises(AssertionError):
        assert_same(run(Layout(), packed=True, seen=True), alone, 1e-8)
