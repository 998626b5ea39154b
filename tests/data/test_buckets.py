"""Buckets: every sequence once an epoch, little padding, even shares, and the same loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from training_helpers import BASE, VOCAB, Layout, Outcome, assert_same, train

from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.data.batches import IGNORE_INDEX
from minillm.data.buckets import Buckets, padded, padded_length
from minillm.data.microbatches import in_turn, load_of
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.tasks.protocol import Unequal


def some_lengths(low: int, high: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Return random lengths from `low` to `high` - 1."""
    return np.random.default_rng(4).integers(low, high, shape)


@pytest.mark.parametrize("size", [1, 3, 16, 37, 64, 100])
def test_every_epoch_has_each_sequence_once(size: int) -> None:
    batch = 8
    found = Buckets(some_lengths(1, 60, size), batch, 5, total=3 * size, window=4)
    steps = [found.rows(step) for step in range(-(-3 * size // batch) + 1)]
    assert all(len(rows) == batch for rows in steps)
    read = np.concatenate(steps)
    assert sorted(read[read >= 0]) == sorted([*range(size)] * 3)
    assert (np.sum(read < 0) + 3 * size) == batch * len(steps)
    if size % batch == 0:  # epochs end between steps
        assert sorted(np.concatenate(steps[: size // batch])) == [*range(size)]
    for rows in steps:
        lengths = found.row_lengths(rows)[:, 0]
        assert (np.diff(lengths) >= 0).all()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    lengths = some_lengths(1, 60, 500)
    one, other = (Buckets(lengths, 8, 5, window=4) for _ in range(2))
    late = [other.rows(step) for step in (70, 3, 0)]
    assert all((one.rows(step) == rows).all() for step, rows in zip((70, 3, 0), late, strict=True))
    assert (Buckets(lengths, 8, 6, window=4).rows(3) != one.rows(3)).any()
    assert (one.rows(0) != one.rows(500 // 4)).any()
    # Windows begin where the run began with these data.
    moved = Buckets(lengths, 8, 5, window=4, first=-32)
    assert (moved.rows(4) == one.rows(0)).all()


def test_sequences_of_two_parts_are_sorted_by_both() -> None:
    lengths = some_lengths(1, 5, (200, 2))
    found = Buckets(lengths, 20, 1)
    for step in range(10):
        pairs = [tuple(lengths[row]) for row in found.rows(step)]
        assert pairs == sorted(pairs)


def test_sorted_windows_leave_little_padding_and_even_shares() -> None:
    sizes = np.minimum(np.random.default_rng(4).geometric(0.1, 20_000), 64)
    padding = {}
    for window in (1, 50):
        found = Buckets(sizes, 32, 1, window=window)
        cut, lengths = in_turn(32, 4, 1), [found.row_lengths(found.rows(s)) for s in range(40)]
        loads = [load_of(each, cut) for each in lengths]
        real, computed = (sum(each[i] for each in loads) for i in range(2))
        padding[window] = computed / real
    # A batch of 32 random ones is as long as its longest: about four times the mean here.
    assert padding[50] < 1.5 < 2 < padding[1]
    assert np.mean([each.balance for each in loads]) < 1.05


def test_no_sequence_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sequence"):
        Buckets(np.empty(0, np.int64), 8, 1)


# One loss, whatever the shapes

DOCUMENTS = [
    np.random.default_rng(seed).integers(0, VOCAB, length)
    for seed, length in enumerate(some_lengths(2, BASE["context"] + 2, 60))
]


class Documents:
    """Language modelling on documents of unequal lengths; `whole` pads all to the context."""

    losses = ("loss",)
    together = False

    def __init__(self, whole: bool = False, local: bool = False) -> None:
        lengths = np.array([len(each) - 1 for each in DOCUMENTS])
        self.order = Buckets(lengths, BASE["batch"], 3, window=3)
        self.whole, self.local = whole, local

    def row_lengths(self, step: int) -> np.ndarray:
        return self.order.row_lengths(self.order.rows(step))

    def batch(self, step: int, rows: np.ndarray, device: Device) -> Batch:
        """Return the rows, padded to the longest of this microbatch."""
        sequences = self.order.rows(step)
        counted = self.order.row_lengths(sequences)[:, 0]
        documents, lengths = [DOCUMENTS[s] for s in sequences[rows]], counted[rows]
        size = BASE["context"] if self.whole else int(padded_length(lengths.max(), BASE["context"]))
        tokens = padded([each[:-1] for each in documents], size, 0)
        targets = padded([each[1:] for each in documents], size, IGNORE_INDEX)
        divisor = float((lengths if self.local else counted).sum())
        return Batch(
            {"tokens": tokens, "targets": targets},
            {"loss": divisor},
            Where(step, rows, np.arange(size), device=device),
            KeyLimits(lengths=lengths),
        )


def run(layout: Layout, model: str = "gpt2", **kind: bool) -> Outcome:
    task: Any = Documents(**kind)
    assert isinstance(task, Unequal)
    return train(model, layout, steps=2, options={"task": task})


@pytest.fixture(scope="module")
def whole() -> Outcome:
    """One rank, one microbatch, every row as long as the context."""
    return run(Layout(), whole=True)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_microbatches=4),
        Layout(dp=2, num_microbatches=2),
        Layout(tp=2, sp=True, num_microbatches=2),
        Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2),
    ],
    ids=str,
)
def test_bucketed_batches_give_the_loss_of_padded_ones(layout: Layout, whole: Outcome) -> None:
    assert_same(run(layout), whole, 1e-8)


def test_lengths_that_tp_does_not_divide_give_the_same() -> None:
    """Cut rows of 1 to 16 tokens over three ranks, whose context of 18 divides."""
    sizes: dict[str, Any] = dict(heads=6, head_width=6, ffn_dim=48, context=18)
    task: dict[str, Any] = {"task": Documents()}
    alone = train("gpt2", Layout(), steps=2, options=task, **sizes)
    cut = train("gpt2", Layout(tp=3, sp=True, num_microbatches=2), steps=2, options=task, **sizes)
    assert_same(cut, alone, 1e-8)


@pytest.mark.parametrize("model", ["bert", "seq2seq"])
def test_time_shards_of_other_families_may_differ(model: str) -> None:
    """Cut rows over three ranks: pairs of sentences, and sources with their translations."""
    sizes: dict[str, Any] = dict(heads=6, dim=36, ffn_dim=48, context=18)
    alone = train(model, Layout(), steps=2, **sizes)
    cut = train(model, Layout(tp=3, sp=True, num_microbatches=2), steps=2, **sizes)
    assert_same(cut, alone, 1e-8)


def test_a_divisor_of_the_own_rows_is_seen(whole: Outcome) -> None:
    """Plant the usual bug: divide by what the microbatch counts."""
    with pytest.raises(AssertionError):
        assert_same(run(Layout(dp=2), local=True), whole, 1e-8)
