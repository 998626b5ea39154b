"""Pooling: one vector of length 1 for each sequence.

    hidden [B, T, D] -> mean over the real positions, or position 0 -> x / |x| -> [B, D]

Where time is sharded, each tp rank adds its own positions, and B D elements are summed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace, sum_dtype
from minillm.params.where import Pass

SMALLEST = 1e-12  # length that a vector is at least divided by


def mean_of_time(hidden: Tensor, pass_: Pass) -> Tensor:
    """Return this rank's part of the means of hidden [B, T_local, D] over real positions: [B, D].

    The parts of all tp ranks add up to the means. On one of whole sequences it is the mean.
    """
    times, whole = pass_.where.times, pass_.whole.times
    assert times is not None and whole is not None
    lengths = None if pass_.limits is None else pass_.limits.lengths
    if lengths is None:
        lengths = np.full(len(hidden.data), whole.shape[-1])
    shares = (times < lengths[:, None]) / lengths[:, None]  # [B, T_local]
    weights = pass_.where.device.upload(shares.astype(sum_dtype(hidden.dtype)))
    return _Weighted.apply(hidden, weights=weights)


def unit_length(x: Tensor) -> Tensor:
    """Return x [B, D] with each row divided by its length."""
    return _Unit.apply(x)


class _Weighted(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, weights: Array) -> Array:
        ctx.save(weights, x.dtype)
        return (weights[:, :, None] * x.astype(weights.dtype, copy=False)).sum(1)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        weights, dtype = ctx.saved
        return ((weights[:, :, None] * grad_outs[0][:, None]).astype(dtype, copy=False),)


class _Unit(Function):
    @staticmethod
    def forward(ctx: Context, x: Array) -> Array:
        xp, wide = namespace(x), x.astype(sum_dtype(x.dtype), copy=False)
        lengths = xp.maximum(xp.sqrt((wide * wide).sum(1)[:, None]), SMALLEST)
        y = wide / lengths
        ctx.save(y, lengths, x.dtype)
        return y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        y, lengths, dtype = ctx.saved
        grad = grad_outs[0]
        along = (grad * y).sum(1)[:, None]
        return (((grad - along * y) / lengths).astype(dtype, copy=False),)
