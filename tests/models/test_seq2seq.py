"""Encoder-decoder: one rank's result on every mesh, and that of plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from models.seq2seq_helpers import PAIRS, run
from training_helpers import BASE, Layout, Outcome, assert_same

from minillm.base.device import CPU
from minillm.models import seq2seq
from minillm.models.protocol import Batch
from minillm.nn.attention import CrossAttention
from minillm.tasks.translation import Translating


@pytest.fixture(scope="module")
def one_rank() -> Outcome:
    return run(Layout())


# The tied matrix lies on up to three stages.
LAYOUTS: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(tp=4, sp=True, num_microbatches=2), {}),
    (Layout(pp=3, num_microbatches=2, stage_layers="1,2,1"), {}),
    (Layout(pp=4, num_microbatches=2), {}),
]
MORE_LAYOUTS: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(dp=2, tp=2, num_microbatches=2), {}),
    (Layout(pp=4, num_microbatches=4, schedule="gpipe"), {}),
    (Layout(pp=2, tp=2, sp=True, num_microbatches=2), {}),
    (Layout(dp=2, pp=2, num_microbatches=2, stage_layers="3,1"), {"zero": 3}),
    (Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2), {"zero": 1}),
    (Layout(pp=2, num_microbatches=2), {"recompute": "full"}),
    (Layout(tp=2, num_microbatches=2), {"recompute": "selective"}),
]


@pytest.mark.parametrize(
    ("layout", "more"),
    [*LAYOUTS, *(pytest.param(*each, marks=pytest.mark.matrix) for each in MORE_LAYOUTS)],
    ids=str,
)
def test_equals_one_rank(layout: Layout, more: dict[str, Any], one_rank: Outcome) -> None:
    assert_same(run(layout, **more), one_rank, 1e-8)


@pytest.mark.matrix
@pytest.mark.parametrize("model", ["post", "untied", "biased"])
def test_other_models(model: str) -> None:
    expected = run(Layout(), model)
    assert_same(run(Layout(pp=2, tp=2, num_microbatches=2), model), expected, 1e-8)
    assert_same(run(Layout(pp=4, dp=2, num_microbatches=2), model), expected, 1e-8)


def test_targets_are_one_token_ahead() -> None:
    task = Translating(PAIRS, BASE["context"], BASE["batch"], seed=3)
    batch, pairs = task.batch(2, np.array([3, 15]), CPU), task.order.rows(2)[[3, 15]]
    target, targets = batch.arrays["target"], batch.arrays["targets"]
    for row, pair in enumerate(pairs):
        ids, read = PAIRS.targets[pair], PAIRS.sources[pair]
        assert ids[-1] == read[-1] == PAIRS.end and target[row, 0] == PAIRS.end
        assert target[row, 1 : len(ids)].tolist() == ids[:-1].tolist()
        assert targets[row].tolist() == ids.tolist() + [-100] * (len(targets[row]) - len(ids))
        assert batch.arrays["source"][row, : len(read)].tolist() == read.tolist()
        assert batch.memory.lengths[row] == len(read)
    assert batch.divisors["loss"] == sum(len(PAIRS.targets[p]) for p in task.order.rows(2))


def test_sources_beyond_their_length_change_nothing(one_rank: Outcome) -> None:
    """Fill the padding of the sources with other tokens."""

    class Refilled(Translating):
        def batch(self, step: int, rows: np.ndarray, device: Any) -> Batch:
            batch = super().batch(step, rows, device)
            source, lengths = batch.arrays["source"], batch.memory.lengths
            source[np.arange(source.shape[1]) >= lengths[:, None]] = 4
            return batch

    task = Refilled(PAIRS, BASE["context"], BASE["batch"], seed=3)
    assert_same(run(Layout(), trainer={"task": task}), one_rank, 1e-14)


def test_a_memory_that_enters_once_a_layer_and_once_a_stage_is_seen(
    one_rank: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant a bug: sum the gradient of the memory over tp twice."""
    original = CrossAttention._keys

    def again(self: CrossAttention, pass_: Any) -> Any:
        states = self.q.region.enter(pass_.memory.states, pass_.memory.where)
        memory = pass_.memory._replace(states=states)
        return original(self, dataclasses.replace(pass_, memory=memory))

    monkeypatch.setattr(CrossAttention, "_keys", again)
    with pytest.raises(AssertionError):
        assert_same(run(Layout(tp=2)), one_rank, 1e-8)


def test_padded_rows_in_the_mean_of_label_smoothing_are_seen(
    one_rank: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant a bug: take the mean of -log p over 30 rows, of which one is padding."""
    original = seq2seq.smoothing_loss
    monkeypatch.setattr(
        seq2seq, "smoothing_loss", lambda *a, vocab, **k: original(*a, vocab=vocab + 1, **k)
    )
    with pytest.raises(AssertionError):
        assert_same(run(Layout(tp=2)), one_rank, 1e-8)
