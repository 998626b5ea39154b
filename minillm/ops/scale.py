"""Multiplication by a number."""

from __future__ import annotations

from typing import Any

from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, writeable


def scale(x: Tensor, factor: float) -> Tensor:
    """Return x times `factor`.

    Overwrites `x`, which must be the fresh result of an operation that does not keep it.
    """
    return _Scale.apply(x, factor=factor)


class _Scale(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, factor: float) -> Array:
        ctx.save(factor)
        x *= x.dtype.type(factor)
        return x

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (factor,), grad = ctx.saved, grad_outs[0]
        factor = grad.dtype.type(factor)
        if not (ctx.owns(0) and writeable(grad)):
            return (grad * factor,)
        grad *= factor
        return (grad,)
