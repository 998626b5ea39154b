"""Arithmetic behind the operators of `Tensor`, with NumPy's broadcasting: for scripts and tests.

Models use the fused operations of ops/ instead.
"""

from __future__ import annotations

from typing import Any

from minillm.autograd.tape import Context, Function
from minillm.base.arrays import Array, namespace

Axis = int | tuple[int, ...] | None


class Add(Function):
    """x + y."""

    @staticmethod
    def forward(ctx: Context, x: Any, y: Any) -> Array:
        ctx.save(getattr(x, "shape", ()), getattr(y, "shape", ()))
        return x + y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, ...]:
        grad = grad_outs[0]
        pairs = zip(needs, ctx.saved, strict=True)
        return tuple(_sum_to(grad, shape) if need else None for need, shape in pairs)


class Multiply(Function):
    """x * y, elementwise."""

    @staticmethod
    def forward(ctx: Context, x: Any, y: Any) -> Array:
        ctx.save(ctx.input(0), ctx.input(1))
        return x * y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any]:
        (x, y), grad = ctx.saved, grad_outs[0]
        return (
            _sum_to(grad * y, x.shape) if needs[0] else None,
            _sum_to(grad * x, y.shape) if needs[1] else None,
        )


class MatMul(Function):
    """x [..., M, K] @ y [..., K, N]: [..., M, N]."""

    @staticmethod
    def forward(ctx: Context, x: Array, y: Array) -> Array:
        if x.ndim < 2 or y.ndim < 2:
            raise ValueError(f"@ takes matrices, not shapes {x.shape} and {y.shape}; reshape them")
        ctx.save(ctx.input(0), ctx.input(1))
        return x @ y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any]:
        (x, y), grad = ctx.saved, grad_outs[0]
        return (
            _sum_to(grad @ y.swapaxes(-1, -2), x.shape) if needs[0] else None,
            _sum_to(x.swapaxes(-1, -2) @ grad, y.shape) if needs[1] else None,
        )


class Sum(Function):
    """Sum over `axis`, None for all."""

    @staticmethod
    def forward(ctx: Context, x: Array, *, axis: Axis) -> Array:
        total = namespace(x).asarray(x.sum(axis))
        kept = namespace(x).expand_dims(total, axis) if axis is not None else total
        ctx.save(x.shape, x.dtype, kept.shape)
        return total

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        shape, dtype, kept = ctx.saved
        grad = namespace(grad_outs[0]).empty(shape, dtype)
        grad[...] = grad_outs[0].reshape(kept)
        return (grad,)


class Reshape(Function):
    """The same elements in another shape."""

    @staticmethod
    def forward(ctx: Context, x: Array, *, shape: tuple[int, ...]) -> Array:
        ctx.save(x.shape)
        return x.reshape(shape)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        return (grad_outs[0].reshape(ctx.saved[0]),)


def _sum_to(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum `grad` over the dims along which an array of `shape` was broadcast."""
    if grad.shape == shape:
        return grad
    extra = grad.ndim - len(shape)
    stretched = (i + extra for i, size in enumerate(shape) if size == 1)
    return grad.sum((*range(extra), *stretched)).reshape(shape)
