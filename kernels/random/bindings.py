"""Addressed normals in C: the bits of the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.native import VARIANTS, pool, unavailable
from minillm.kernels.registry import kernel


@kernel("random_normal", backend="c", variant="exact", unavailable=unavailable)
def random_normal(key: int, indices: Any) -> Any:
    indices = np.ascontiguousarray(indices, np.uint64).reshape(-1)
    out = np.empty(indices.shape, np.float64)
    VARIANTS[-1].functions.random_normal(pool(), indices, out, indices.size, key)
    return out
