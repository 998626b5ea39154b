"""Linear layers: y = x W^T + b."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.slot import GradSlot, fresh_of
from minillm.autograd.tape import WRITTEN, Context, Function, Tensor
from minillm.base.arrays import Array, namespace, sum_dtype


def linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Return x [..., in] @ weight [out, in]^T + bias [out]: [..., out]."""
    return _Linear.apply(x, weight, bias)


def add_bias(x: Tensor, bias: Any) -> Tensor:
    """Add bias [D] to x [..., D].

    Overwrites `x`, which must be the fresh result of an operation that does not keep it.
    """
    return _AddBias.apply(x, bias)


class _Linear(Function):
    splits_weight_grad = True

    @staticmethod
    def forward(ctx: Context, x: Array, weight: Array, bias: Array | None) -> Array:
        ctx.save(ctx.input(0), ctx.input(1))
        y = kernels.matmul(_rows(x), weight.T, bias=bias)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any, Any]:
        grad = _rows(grad_outs[0])
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            weight = ctx.load(1)
            grad_x = kernels.matmul(grad, weight).reshape(*grad_outs[0].shape[:-1], weight.shape[1])
        if needs[1]:
            grad_bias = sums_of(grad, into[2]) if needs[2] else None
            grad_weight = product_into(into[1], grad.T, _rows(ctx.load(0)), grad_bias)
        elif needs[2]:
            grad_bias = kernels.column_sum(grad, fresh_of(into[2]))
        return grad_x, grad_weight, grad_bias


class _AddBias(Function):
    splits_weight_grad = True

    @staticmethod
    def forward(ctx: Context, x: Array, bias: Array) -> Array:
        return kernels.add_bias_(x, bias)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any]:
        grad = grad_outs[0]
        return grad, kernels.column_sum(_rows(grad), fresh_of(into[1])) if needs[1] else None


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def sums_of(grad: Array, slot: GradSlot | None) -> Array:
    """Return an array for a bias's gradient, the column sums of `grad`: the slot's own if fresh."""
    fresh = fresh_of(slot)
    return namespace(grad).empty(grad.shape[1], sum_dtype(grad.dtype)) if fresh is None else fresh


def product_into(slot: GradSlot | None, a: Array, b: Array, sums: Array | None) -> Any:
    """Accumulate a @ b into the slot, or return it where there is none.

    `sums`, if given, receives the sums of the rows of `a`.
    """
    if slot is None:
        return kernels.matmul(a, b, sums=sums)
    kernels.matmul(a, b, out=slot.buf, accumulate=slot.writes > 0, sums=sums)
    slot.writes += 1
    return WRITTEN
