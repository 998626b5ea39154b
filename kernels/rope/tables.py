"""The angles of rotary position embedding."""

from __future__ import annotations

from typing import Any

import numpy as np


def rope_tables(times: Any, head_width: int, base: float, dtype: Any) -> tuple[Any, Any]:
    """cos and sin of times[t] * base^(-2i/K), each [T, K/2] of `dtype`, computed in float64."""
    angle = np.asarray(times)[:, None] * base ** (-np.arange(0, head_width, 2) / head_width)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
