"""Token embedding."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.tape import WRITTEN, Context, Function, Tensor
from minillm.base.arrays import Array, namespace, sum_dtype


def embedding(ids: Array, weight: Any, first_row: int = 0) -> Tensor:
    """Look up rows of weight [V_local, D] for ids [...]: [..., D].

    Ids outside [first_row, first_row + V_local) give zeros.
    """
    return _Embedding.apply(weight, ids=ids, first_row=first_row)


class _Embedding(Function):
    splits_weight_grad = True

    @staticmethod
    def forward(ctx: Context, weight: Array, *, ids: Array, first_row: int) -> Array:
        ctx.save(ids, first_row, weight.shape)
        return kernels.embedding_forward(ids, weight, first_row)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any]:
        ids, first_row, shape = ctx.saved
        slot, grad = into[0], grad_outs[0]
        if slot is None:
            grad_weight = namespace(grad).empty(shape, sum_dtype(grad.dtype))
            kernels.embedding_backward_(grad, ids, grad_weight, first_row, accumulate=False)
            return (grad_weight,)
        kernels.embedding_backward_(grad, ids, slot.buf, first_row, accumulate=slot.writes > 0)
        slot.writes += 1
        return (WRITTEN,)
