"""Rotary position embedding in NumPy, halves paired as in Llama."""

from __future__ import annotations

from typing import Any

from minillm.kernels.registry import kernel


@kernel("rope_")
def rope_(x: Any, cos: Any, sin: Any, inverse: bool = False) -> None:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None, :], -sin[:, None, :] if inverse else sin[:, None, :]
    turned = b * c
    turned += a * s
    a *= c
    a -= b * s
    b[...] = turned
