"""Timed calls of a training step: rope."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    B, T, H, K = sizes.rows // sizes.context, sizes.context, sizes.dim // 64, 64
    x = sizes.normals(B, T, 3 * H, K)[:, :, :H]  # queries within the fused projection
    cos, sin = kernels.rope_tables(np.arange(T), K, 1e4, np.float32)
    yield Call(kernels.rope_, 2 * x.nbytes, x, cos, sin)
