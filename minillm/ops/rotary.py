"""Rotary positions: rotations of the queries and keys of a fused projection."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, writeable
from minillm.ops.attention import split_heads


def rotary(qkv: Tensor, *, heads: int, kv_heads: int, cos: Array, sin: Array) -> Tensor:
    """Rotate the queries and keys of qkv [B, T, (H + 2 Hkv) K] (Su et al. 2021, arXiv:2104.09864).

    cos, sin: [T, R/2], or [B T, R/2] for positions that differ between samples. The first R
    channels of a head turn. Overwrites `qkv`, which must be the fresh result of an operation that
    does not keep it: a projection keeps its input, not its output.
    """
    return _Rotary.apply(qkv, heads=heads, kv_heads=kv_heads, cos=cos, sin=sin)


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Context, qkv: Array, *, heads: int, kv_heads: int, cos: Array, sin: Array
    ) -> Array:
        ctx.save(heads, kv_heads, cos, sin)
        _rotate_(qkv, heads, kv_heads, cos, sin)
        return qkv

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        heads, kv_heads, cos, sin = ctx.saved
        grad = grad_outs[0] if ctx.owns(0) and writeable(grad_outs[0]) else grad_outs[0].copy()
        _rotate_(grad, heads, kv_heads, cos, sin, inverse=True)
        return (grad,)


def _rotate_(
    qkv: Array, heads: int, kv_heads: int, cos: Array, sin: Array, inverse: bool = False
) -> None:
    """Rotate queries and keys in place. A row of `cos` serves one time or one (sample, time)."""
    if len(cos) != qkv.shape[1]:
        qkv = qkv.reshape(1, -1, qkv.shape[2])  # a view: the samples as one sequence
    for part in split_heads(qkv, heads, kv_heads)[:2]:
        kernels.rope_(part[..., : 2 * cos.shape[1]], cos, sin, inverse=inverse)
