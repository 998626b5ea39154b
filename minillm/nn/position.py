"""Constant position tables."""

from __future__ import annotations

import numpy as np


def sinusoidal_table(times: np.ndarray, dim: int, dtype: np.dtype) -> np.ndarray:
    """Rows [T, D] of the sinusoidal encoding at global positions `times`: sin on even channels, cos
    on odd ones (Vaswani et al. 2017, section 3.5)."""
    frequency = 10000.0 ** (-2.0 * np.arange((dim + 1) // 2) / dim)
    angle = times[:, None] * frequency[None, :]
    table = np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(len(times), -1)
    return table[:, :dim].astype(dtype)
