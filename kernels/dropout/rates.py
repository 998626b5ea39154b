"""Timed calls of a training step: dropout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    B, T, D = sizes.rows // sizes.context, sizes.context, sizes.dim
    x = sizes.normals(B, T, D)
    address = (7, np.arange(B), np.arange(T), np.arange(D))
    yield Call(kernels.dropout_forward, 2 * x.nbytes, x, 0.1, *address)
