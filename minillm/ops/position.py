"""Positions: added to hidden states, or as rotations of a fused projection."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace, sum_dtype, writeable
from minillm.ops.attention import split_heads


def add_position(x: Tensor, table: Any, times: np.ndarray) -> Tensor:
    """Add table[times] to x [B, T, D].

    table: [T_max, D]; times: int64 [T] or [B, T], global positions on the host. Overwrites `x`,
    which must be the fresh result of an operation that does not keep it.
    """
    return _AddPosition.apply(x, table, times=times)


def add_constant(x: Tensor, constant: Array) -> Tensor:
    """Return x + constant, broadcast. The constant gets no gradient."""
    return _AddConstant.apply(x, constant=constant)


def rotary(qkv: Tensor, *, heads: int, kv_heads: int, cos: Array, sin: Array) -> Tensor:
    """Rotate the queries and keys of qkv [B, T, (H + 2 Hkv) K] (Su et al. 2021, arXiv:2104.09864).

    cos, sin: [T, K/2], or [B T, K/2] for positions that differ between samples. Overwrites `qkv`,
    which must be the fresh result of an operation that does not keep it: a projection keeps its
    input, not its output.
    """
    return _Rotary.apply(qkv, heads=heads, kv_heads=kv_heads, cos=cos, sin=sin)


class _AddPosition(Function):
    splits_weight_grad = True

    @staticmethod
    def forward(ctx: Context, x: Array, table: Array, *, times: np.ndarray) -> Array:
        rows = _rows_at(times)
        ctx.save(rows, table.shape)
        x += table[rows]
        return x

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any]:
        rows, shape = ctx.saved
        grad = grad_outs[0]
        if not needs[1]:
            return grad, None
        xp = namespace(grad)
        if not isinstance(rows, slice) and rows.ndim == 2:
            grad_table = xp.empty(shape, sum_dtype(grad.dtype))
            kernels.embedding_backward_(grad, xp.asarray(rows), grad_table, 0, accumulate=False)
            return grad, grad_table
        sums = kernels.column_sum(grad.reshape(len(grad), -1)).reshape(grad.shape[1:])
        if sums.shape == shape and isinstance(rows, slice):
            return grad, sums
        grad_table = xp.zeros(shape, sums.dtype)
        grad_table[rows] = sums
        return grad, grad_table


def _rows_at(times: np.ndarray) -> slice | np.ndarray:
    """Return positions as an index: a slice where they are consecutive, as in most passes."""
    return times if times.ndim > 1 else _as_range(times.tobytes(), times.dtype) or times


@functools.lru_cache(maxsize=16)  # the same positions in every step
def _as_range(times: bytes, dtype: np.dtype) -> slice | None:
    positions = np.frombuffer(times, dtype)
    first = int(positions[0]) if len(positions) else 0
    stop = first + len(positions)
    return slice(first, stop) if np.array_equal(positions, np.arange(first, stop)) else None


class _AddConstant(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, constant: Array) -> Array:
        return x + constant

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        return (grad_outs[0],)


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
        kernels.rope_(part, cos, sin, inverse=inverse)
