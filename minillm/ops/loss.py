"""Losses. Each is scaled by its divisor alone: the count over the global batch that it averages."""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array


def cross_entropy(
    logits: Tensor, targets: Array, *, divisor: float, ignore_index: int = -100
) -> Tensor:
    """Sum -log softmax(logits)[target], divided by `divisor`: a float64 scalar.

    logits: [..., V]; targets: [...] int, of which those equal to `ignore_index` do not count.
    """
    return _CrossEntropy.apply(logits, targets=targets, divisor=divisor, ignore_index=ignore_index)


def mse_loss(x: Tensor, target: Array, *, divisor: float) -> Tensor:
    """Sum (x - target)^2, divided by `divisor`: a float64 scalar."""
    return _MSE.apply(x, target=target, divisor=divisor)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Context, logits: Array, *, targets: Array, divisor: float, ignore_index: int
    ) -> Array:
        rows, flat = logits.reshape(-1, logits.shape[-1]).copy(), targets.reshape(-1)
        counted = flat != ignore_index
        row_max = kernels.xent_max(rows)
        sums, target_logit = kernels.xent_shifted_sum_(rows, row_max, flat, 0)
        ctx.save(rows, sums, flat, counted, divisor, logits.shape)
        return np.asarray(
            float(np.sum((np.log(sums) - target_logit)[counted], dtype=np.float64)) / divisor
        )

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        rows, sums, flat, counted, divisor, shape = ctx.saved
        kernels.xent_grad_(
            rows, sums, flat, 0, (counted * (float(grad_outs[0]) / divisor)).astype(rows.dtype)
        )
        return (rows.reshape(shape),)


class _MSE(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, target: Array, divisor: float) -> Array:
        difference = x - target
        ctx.save(difference, divisor)
        return np.asarray(float(np.sum(difference * difference, dtype=np.float64)) / divisor)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        difference, divisor = ctx.saved
        return (difference * difference.dtype.type(2 * float(grad_outs[0]) / divisor),)
