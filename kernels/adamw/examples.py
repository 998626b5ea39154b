"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def adamw_(make: Maker) -> Any:
    n = make.sizes.T * make.sizes.width
    grad, param, exp_avg, exp_avg_sq = make(n), *(make(n, dtype=make.statistics) for _ in range(3))
    exp_avg_sq = abs(exp_avg_sq)
    options: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "step": 1,
    }
    kernels.adamw_(param, grad, exp_avg, exp_avg_sq, **options)
    return param, exp_avg, exp_avg_sq


def sgd_(make: Maker) -> Any:
    n = make.sizes.T * make.sizes.width
    param = make(n)
    kernels.sgd_(param, make(n), lr=0.1)
    return param
