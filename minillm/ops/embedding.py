"""Embeddings of tokens and positions."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import WRITTEN, Context, Function, Tensor
from minillm.base.arrays import Array, namespace, placed, sum_dtype


def embedding(ids: Array, weight: Any, first_row: int = 0) -> Tensor:
    """Look up rows of weight [V_local, D], a table or activations, for ids [...]: [..., D].

    Ids outside [first_row, first_row + V_local) give zeros.
    """
    return _Embedding.apply(weight, ids=ids, first_row=first_row)


def add_position(x: Tensor, table: Any, times: np.ndarray) -> Tensor:
    """Add table[times] to x [B, T, D].

    table: [T_max, D]; times: int64 [T] or [B, T], global positions on the host. Overwrites `x`,
    which must be the fresh result of an operation that does not keep it.
    """
    return _AddPosition.apply(x, table, times=times)


def add_constant(x: Tensor, constant: Array) -> Tensor:
    """Return x + constant, broadcast. The constant gets no gradient."""
    return _AddConstant.apply(x, constant=constant)


class _Embedding(Function):
    splits_weight_grad = True

    @staticmethod
    def forward(ctx: Context, weight: Array, *, ids: Array, first_row: int) -> Array:
        ctx.save(ids, first_row, weight.shape, weight.dtype)
        return kernels.embedding_forward(ids, weight, first_row)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any]:
        ids, first_row, shape, dtype = ctx.saved
        slot, grad = into[0], grad_outs[0]
        if slot is None:
            grad_weight = namespace(grad).empty(shape, sum_dtype(grad.dtype))
            kernels.embedding_backward_(grad, ids, grad_weight, first_row, accumulate=False)
            return (grad_weight.astype(dtype, copy=False),)
        kernels.embedding_backward_(grad, ids, slot.buf, first_row, accumulate=slot.writes > 0)
        slot.writes += 1
        return (WRITTEN,)


class _AddPosition(Function):
    splits_weight_grad = True

    @staticmethod
    def forward(ctx: Context, x: Array, table: Array, *, times: np.ndarray) -> Array:
        rows = _rows_at(times)
        ctx.save(rows, table.shape)
        x += table[placed(table, rows)]
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
