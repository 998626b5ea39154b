"""Timed calls of a training step: adamw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    n = 8 << 20  # 32 MB an array, beyond every cache
    param, grad, exp_avg = (sizes.normals(n) for _ in range(3))
    exp_avg_sq = np.ones(n, np.float32)
    options: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    arrays = (param, grad, exp_avg, exp_avg_sq)
    yield Call(kernels.adamw_, 7 * grad.nbytes, *arrays, step=10, **options)
