"""Constant position tables."""

from __future__ import annotations

import numpy as np


def sinusoidal_table(times: np.ndarray, dim: int, dtype: np.dtype) -> np.ndarray:
    """Return the sinusoidal encoding [*times.shape, dim] of global positions `times`.

    Even channels hold sines and odd ones cosines (Vaswani et al. 2017, section 3.5).
    """
    frequency = 10000.0 ** (-2.0 * np.arange((dim + 1) // 2) / dim)
    angle = times[..., None] * frequency
    table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(*times.shape, -1)
    return table[..., :dim].astype(dtype)
