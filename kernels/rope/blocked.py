"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves paired as in Llama: channel
i turns with channel i + K/2."""

from __future__ import annotations

from typing import Any

from minillm.kernels.registry import kernel


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
