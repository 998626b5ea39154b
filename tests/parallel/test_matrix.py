"""Law 1, one answer: training gives the same on every layout as on one rank.

The tests compare loss, every gradient and the weights after three steps, with dropout on.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import os
from typing import Any

import numpy as np
import pytest
from layouts import (
    MATRIX_CELLS,
    QUICK_CELLS,
    WIDE_PAIRS,
    WIDE_TRIPLES,
    WideCell,
    all_cells,
    covering,
    factors,
    sampled_cells,
)
from pipeline.placements import greedy, interleaved_ranks, v_ranks
from replication.gradient_server import GradientServer
from replication.sharded_moments import ShardedMoments
from training_helpers import BASE, STEPS, Layout, Outcome, assert_same, compare, reference, train

from minillm.training.resolve import ResolvedConfig

TOLERANCE = 1e-10  # float64
WIDE_TOLERANCE = 1e-8  # AdamW divides rounding by small second moments

# Drawn again each day, and printed in the names of the tests that run.
SEED = int(os.environ.get("MINILLM_SAMPLE_SEED", datetime.date.today().toordinal()))
SAMPLE = [cell for cell in sampled_cells(20, SEED) if cell not in {*QUICK_CELLS, *MATRIX_CELLS}]
# The days of the sample: as many in a row run every triple of the wide cells.
DAYS = 12
TODAY = WIDE_TRIPLES[SEED % DAYS :: DAYS]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_covering_arrays_cover(strength: int) -> None:
    """Check by brute force that chosen cells hold every combination of factor values."""
    cells = [cell for cell in all_cells() if cell[0] in ("gpt2", "llama")]
    chosen = covering(cells, strength)
    assert len(chosen) < len(cells) / 3
    for cell in cells:
        for wanted in itertools.combinations(factors(cell), strength):
            assert any(set(wanted) <= set(factors(other)) for other in chosen)


@pytest.mark.parametrize(("model", "layout"), QUICK_CELLS, ids=str)
def test_float64_equals_one_rank(model: str, layout: Layout) -> None:
    assert_same(train(model, layout), reference(model), TOLERANCE)


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "layout"), MATRIX_CELLS, ids=str)
def test_more_cells_equal_one_rank(model: str, layout: Layout) -> None:
    assert_same(train(model, layout), reference(model), TOLERANCE)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "layout"), SAMPLE, ids=[f"seed{SEED}-{model}-{layout}" for model, layout in SAMPLE]
)
def test_sampled_cells_equal_one_rank(model: str, layout: Layout) -> None:
    assert_same(train(model, layout), reference(model), TOLERANCE)


REPLICATE = {"server": GradientServer, "sharded": ShardedMoments}


def train_wide(cell: WideCell, steps: int = STEPS) -> Outcome:
    """Train with AdamW: its moments are what the methods of data parallelism share and cut."""
    model, layout, placement, method, recompute = cell
    options: dict[str, Any] = {"replicate": REPLICATE[method]} if method in REPLICATE else {}
    changes: dict[str, Any] = {"recompute": recompute}
    replaced: dict[str, Any] = {}
    if placement:
        chain = tuple(range(layout.pp))
        ranks = {
            "split": chain,
            "interleaved": interleaved_ranks(2, 2),
            "v": v_ranks(2),
            "v-split": v_ranks(2),
        }[placement]
        split = placement.endswith("split")
        options["schedule"] = greedy(ranks, layout.num_microbatches, split=split)
        replaced["stage_layers"] = (4 // len(ranks),) * len(ranks)
    if method in ("node", "nodes"):
        changes["node_shared"] = "on"
        on_first = layout.num_ranks // (1 if method == "node" else 2)
        changes["nodes"] = [int(rank >= on_first) for rank in range(layout.num_ranks)]

    def adapt(config: ResolvedConfig) -> ResolvedConfig:
        return dataclasses.replace(config, **replaced)

    return train(
        model, layout, optimizer="adamw", steps=steps, options=options, adapt=adapt, **changes
    )


@functools.cache
def wide_reference(model: str) -> Outcome:
    return train_wide((model, Layout(), "", "all-reduce", "none"))


def wide_name(cell: WideCell) -> str:
    model, layout, placement, method, recompute = cell
    name = str(layout).replace("-1f1b", f"-{placement}") if placement else str(layout)
    return "-".join([model, name, method, recompute])


@pytest.mark.matrix
@pytest.mark.parametrize("cell", [*WIDE_PAIRS, *TODAY], ids=wide_name)
def test_wide_cells_equal_one_rank(cell: WideCell) -> None:
    """Check law 1 on schedules, methods and models that the project lacks.

    The cells hold all pairs of factor values, and a share of the triples.
    """
    assert_same(train_wide(cell), wide_reference(cell[0]), WIDE_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("cell", WIDE_TRIPLES, ids=wide_name)
def test_wide_triples_equal_one_rank(cell: WideCell) -> None:
    assert_same(train_wide(cell), wide_reference(cell[0]), WIDE_TOLERANCE)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2), Layout(tp=2, sp=True), Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4)],
    ids=str,
)
def test_float32_gradients_and_sgd_weights(model: str, layout: Layout) -> None:
    """Compare norm-wise within 8 eps sqrt(n), over a few layers.

    n is the longest reduction that a gradient goes through: the tokens of the batch.
    """
    expected = reference(model, changes=(("dtype", "float32"),))
    found = train(model, layout, dtype="float32")
    tolerance = 8 * np.finfo(np.float32).eps * np.sqrt(BASE["batch"] * BASE["context"])
    compare(found.first_grads, expected.first_grads, tolerance, "first_grads")
    compare(found.weights, expected.weights, tolerance, "weights")
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=4), Layout(tp=4), Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4)],
    ids=str,
)
def test_float32_adamw(model: str, layout: Layout) -> None:
    """Compare weights within 1e-2 lr a step.

    AdamW divides by the gradient's own size, which turns rounding of tiny gradients into steps. A
    key bias has no true gradient, so the qkv biases are left out.
    """
    changes = dict(dtype="float32", lr=1e-3, warmup=0)
    expected = reference(model, "adamw", 5, tuple(changes.items()))
    found = train(model, layout, optimizer="adamw", steps=5, **changes)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for name, weight in expected.weights.items():
        if not name.endswith("qkv.bias"):
            assert np.abs(found.weights[name] - weight).max() <= 1e-2 * changes["lr"] * 5, name


@pytest.mark.parametrize(
    "layout",
    [Layout(pp=2, num_microbatches=4), Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4)],
    ids=str,
)
def test_schedules_agree_bit_for_bit(layout: Layout) -> None:
    runs = [
        train("gpt2", Layout(**{**vars(layout), "schedule": schedule}), dtype="float32")
        for schedule in ("gpipe", "1f1b")
    ]
    assert runs[0].losses == runs[1].losses
    for name, weight in runs[0].weights.items():
        assert np.array_equal(weight, runs[1].weights[name]), name


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, pp=2, num_microbatches=4),
        Layout(tp=2, pp=4, num_microbatches=2),
        Layout(pp=4, num_microbatches=8, schedule="gpipe"),
    ],
    ids=str,
)
def test_no_deadlock_without_buffering(layout: Layout) -> None:
    assert_same(
        train("gpt2", layout, steps=2, rendezvous=True), reference("gpt2", steps=2), TOLERANCE
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_recompute_changes_no_bit(model: str, mode: str) -> None:
    plain, again = (
        train(model, Layout(tp=2, pp=2, num_microbatches=2), recompute=how)
        for how in ("none", mode)
    )
    assert plain.losses == again.losses
    for name, weight in plain.weights.items():
        assert np.array_equal(weight, again.weights[name]), name


@pytest.mark.full
@pytest.mark.parametrize(("model", "layout"), all_cells(), ids=str)
def test_full_matrix(model: str, layout: Layout) -> None:
    assert_same(train(model, layout), reference(model), TOLERANCE)
