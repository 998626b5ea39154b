"""Law 1 on the stand-in: device arrays on a mesh train as on one rank.

The layouts are those of the CPU's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import layouts
import numpy as np
import pytest
from standin.install import installed
from test_step import FLOAT32, error, sizes
from training_helpers import BASE, INIT_STD, Layout, Outcome, compare, train

from minillm.comm import staging

SPREAD = [
    *(Layout(dp=2), Layout(dp=4, num_microbatches=2), Layout(tp=2), Layout(tp=2, sp=True)),
    *(Layout(pp=2, num_microbatches=4), Layout(pp=2, schedule="gpipe", num_microbatches=2)),
    Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4),
]
CELLS = [(model, layout) for model in ("gpt2", "llama") for layout in SPREAD]
FULL = list(dict.fromkeys([*layouts.TABLE, *layouts.all_cells()]))
WHOLE: dict[str, Any] = dict(
    layers=BASE["layers"], heads=BASE["heads"], dim=32 * BASE["heads"]
)  # for stages and heads of every layout


def scale(model_sizes: dict[str, Any]) -> float:
    """Return the standard deviation of the weights.

    It falls with the width, so that products grow as in the CPU's matrix, whose model is narrower.
    """
    return INIT_STD * math.sqrt(BASE["dim"] / model_sizes["dim"])


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(staging, "STAGING_BYTES", 4096)  # several chunks in most messages
    with installed() as module:
        yield module


@cache
def alone(
    model: str, optimizer: str, steps: int, std: float, options: tuple[tuple[str, Any], ...]
) -> Outcome:
    """Train on one rank, in one microbatch."""
    with installed():
        return train(model, Layout(), optimizer=optimizer, steps=steps, std=std, **dict(options))


def check_float32(model: str, layout: Layout, model_sizes: dict[str, Any]) -> None:
    """Compare losses, norms, gradients and weights with those of one rank, to rounding.

    The run is two steps of SGD with dropout on.
    """
    options, std = model_sizes | dict(dtype="float32", device="cuda"), scale(model_sizes)
    want = alone(model, "sgd", 2, std, tuple(options.items()))
    found = train(
        model, layout, steps=2, std=std, direct=layout.tp == 2, **options
    )  # device memory goes both ways
    np.testing.assert_allclose(found.losses, want.losses, rtol=FLOAT32)
    np.testing.assert_allclose(found.norms, want.norms, rtol=FLOAT32)
    compare(found.first_grads, want.first_grads, FLOAT32, "first_grads")
    compare(found.weights, want.weights, FLOAT32, "weights")


def check_bfloat16(model: str, layout: Layout, model_sizes: dict[str, Any]) -> None:
    """Compare gradients with those of one rank in bfloat16.

    They deviate by at most twice what the one-rank run in bfloat16 deviates from float64.
    """
    options = model_sizes | dict(dropout=0.0)
    narrow, std = options | dict(dtype="bfloat16", device="cuda"), scale(model_sizes)
    exact = alone(model, "sgd", 1, std, tuple((options | dict(dtype="float64")).items()))
    want = alone(model, "adamw", 1, std, tuple(narrow.items()))
    found = train(
        model, layout, optimizer="adamw", steps=1, std=std, direct=layout.pp == 2, **narrow
    )
    assert error(found, want) <= 2 * error(want, exact)
    assert math.isclose(found.losses[0], want.losses[0], rel_tol=2.0**-9)


@pytest.mark.parametrize(("model", "layout"), CELLS, ids=str)
def test_float32_equals_one_rank(model: str, layout: Layout) -> None:
    check_float32(model, layout, sizes(model))


@pytest.mark.parametrize(("model", "layout"), CELLS, ids=str)
def test_bfloat16_differs_by_rounding(model: str, layout: Layout) -> None:
    check_bfloat16(model, layout, sizes(model))


@pytest.mark.full
@pytest.mark.parametrize(("model", "layout"), FULL, ids=str)
def test_full_matrix_in_float32(model: str, layout: Layout) -> None:
    check_float32(model, layout, WHOLE)


@pytest.mark.full
@pytest.mark.parametrize(("model", "layout"), FULL, ids=str)
def test_full_matrix_in_bfloat16(model: str, layout: Layout) -> None:
    check_bfloat16(model, layout, WHOLE)
