"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves paired as in Llama: channel
i turns with channel i + K/2."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.registry import kernel


def rope_tables(times: Any, head_width: int, base: float, dtype: Any) -> tuple[Any, Any]:
    """cos, sin [T, K/2] of times[t] * base^(-2i/K), computed in float64."""
    angle = np.asarray(times)[:, None] * base ** (-np.arange(0, head_width, 2) / head_width)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


@kernel("rope_")
def rope_(x: Any, cos: Any, sin: Any, inverse: bool = False) -> None:
    """Rotate x [B, T, H, K] (any strides) in place by cos, sin [T, K/2]; `inverse` rotates back,
    which is the backward pass."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None, :], -sin[:, None, :] if inverse else sin[:, None, :]
    turned = b * c
    turned += a * s
    a *= c
    a -= b * s
    b[...] = turned
