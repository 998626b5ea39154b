"""Casts in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.registry import kernel


@kernel("cast")
def cast(x: Any, dtype: Any, out: Any = None) -> Any:
    if out is None:
        return x.astype(np.dtype(dtype))
    out[...] = x
    return out
