"""Casts between dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np


def cast(x: Any, dtype: Any, out: Any = None) -> Any:
    """x in `dtype`, rounded to nearest, ties to even.

    out: takes the result; has `dtype`, the shape of x and any strides.
    """
    result = x.astype(np.dtype(dtype))
    if out is None:
        return result
    out[...] = result
    return out
