"""Dropout with addressed masks."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, writeable


def dropout(
    x: Tensor, p: float, *, key: int, samples: Array, times: Array, channels: Array
) -> Tensor:
    """Zero each element of x [B, T, C] with probability p and scale the rest by 1 / (1 - p).

    The mask is a function of (key, sample, time, channel), all global. Backward recomputes it.
    """
    return _Dropout.apply(x, p=p, address=(key, samples, times, channels)) if p else x


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, p: float, address: tuple[Any, ...]) -> Array:
        ctx.save(p, address)
        return kernels.dropout_forward(x, p, *address)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        p, address = ctx.saved
        grad = grad_outs[0]
        out = grad if ctx.owns(0) and writeable(grad) and grad.flags.c_contiguous else None
        key, samples, times, channels = address
        return (kernels.dropout_forward(grad, p, key, samples, times, channels, out=out),)
