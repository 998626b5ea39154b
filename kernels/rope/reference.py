"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in complex numbers."""

from __future__ import annotations

from typing import Any


def rope_(x: Any, cos: Any, sin: Any, inverse: bool = False) -> None:
    """Rotate pairs of channels by the angles of their time, in place.

    Channel i turns with channel i + K/2, as in Llama.
    x: [B, T, H, K] of any strides. cos, sin: [T, K/2], see `rope_tables`.
    inverse: rotate back, which is the backward pass.
    """
    half = x.shape[-1] // 2
    turn = (cos - 1j * sin if inverse else cos + 1j * sin)[:, None, :]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    x[..., :half], x[..., half:] = turned.real, turned.imag
