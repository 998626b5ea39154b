"""Losses. Each is scaled by its divisor alone: the count over the global batch that it averages."""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace, sum_dtype


def cross_entropy(
    logits: Tensor, targets: Array, *, divisor: float, ignore_index: int = -100
) -> Tensor:
    """Sum -log softmax(logits)[target], divided by `divisor`: a float64 scalar.

    logits: [..., V]; targets: [...] int, of which those equal to `ignore_index` do not count.
    """
    return _CrossEntropy.apply(logits, targets=targets, divisor=divisor, ignore_index=ignore_index)


def mse_loss(x: Tensor, target: Array, *, divisor: float) -> Tensor:
    """Sum (x - target)^2, divided by `divisor`: a float64 scalar.

    x, target: [...] of equal shapes. Differences are at least float32.
    """
    return _MSE.apply(x, target=target, divisor=divisor)


def binary_cross_entropy(logits: Tensor, targets: Array, *, divisor: float) -> Tensor:
    """Sum -y log s(z) - (1 - y) log s(-z), divided by `divisor`: a float64 scalar.

    s is the sigmoid; logits z: [...]; targets y: [...], 0 or 1. Computed without exponentials of
    positive numbers, so no logit overflows.
    """
    return _BinaryCrossEntropy.apply(logits, targets=targets, divisor=divisor)


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
        wide = sum_dtype(x.dtype)
        difference = x.astype(wide) - target.astype(wide)
        ctx.save(difference, divisor, x.dtype)
        return scalar_of((difference * difference).sum(dtype=np.float64) / divisor)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        difference, divisor, dtype = ctx.saved
        return ((difference * (grad_outs[0] * (2 / divisor))).astype(dtype),)


class _BinaryCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Context, z: Array, *, targets: Array, divisor: float) -> Array:
        xp, wide, dtype = namespace(z), sum_dtype(z.dtype), z.dtype
        z, y = z.astype(wide), targets.astype(wide)
        small = xp.exp(xp.minimum(z, -z))  # exp(-|z|), in (0, 1]
        ctx.save(xp.where(z >= 0, 1.0, small) / (1 + small) - y, divisor, dtype)
        terms = xp.maximum(z, 0) - z * y + xp.log1p(small)
        return scalar_of(terms.sum(dtype=np.float64) / divisor)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        slope, divisor, dtype = ctx.saved
        return ((slope * (grad_outs[0] / divisor)).astype(dtype),)


def scalar_of(total: Any) -> Array:
    """Return a sum as an array without dims, on its device: the host does not wait for it."""
    return np.asarray(total) if np.isscalar(total) else total
