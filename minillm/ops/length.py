"""Length along a dim: zeros behind an array, and the array without what lies behind."""

from __future__ import annotations

from typing import Any

from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace


def lengthened(x: Tensor, dim: int, size: int) -> Tensor:
    """Return x with zeros behind it, of length `size` along `dim`."""
    return x if x.shape[dim] == size else _Lengthened.apply(x, dim=dim, size=size)


def shortened(x: Tensor, dim: int, size: int) -> Tensor:
    """Return the first `size` entries of x along `dim`."""
    return x if x.shape[dim] == size else _Shortened.apply(x, dim=dim, size=size)


class _Lengthened(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, dim: int, size: int) -> Array:
        ctx.save(dim, x.shape[dim])
        return _with_zeros(x, dim, size)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        return (_first(grad_outs[0], *ctx.saved),)


class _Shortened(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, dim: int, size: int) -> Array:
        ctx.save(dim, x.shape[dim])
        return _first(x, dim, size)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        return (_with_zeros(grad_outs[0], *ctx.saved),)


def _first(x: Array, dim: int, size: int) -> Array:
    return namespace(x).ascontiguousarray(x[(slice(None),) * dim + (slice(size),)])


def _with_zeros(x: Array, dim: int, size: int) -> Array:
    out = namespace(x).zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]), x.dtype)
    out[(slice(None),) * dim + (slice(x.shape[dim]),)] = x
    return out
