"""Adjoint test of a derivative: <u, J v> = <J^T u, v> for random u and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minillm.autograd.backward import backward
from minillm.autograd.tape import Tensor, no_grad
from minillm.base.arrays import Array


def gradcheck(
    fn: Callable[..., Any], *inputs: Array, eps: float = 1e-6, tol: float = 1e-6, seed: int = 0
) -> float:
    """Check <u, J v> = <J^T u, v> for random u, v at float64 `inputs`. Returns the relative error.

    J v is computed by central differences. `fn` takes tensors and returns a tensor or a tuple of
    tensors. Raises ArithmeticError if the sides differ by more than `tol`, or if one is NaN.
    """
    generator = np.random.default_rng(seed)
    directions = [generator.standard_normal(x.shape) for x in inputs]
    tensors = [Tensor(x.copy(), True) for x in inputs]
    outs = fn(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [generator.standard_normal(t.shape) for t in outs]
    backward([(t, u.copy()) for t, u in zip(outs, cotangents, strict=True)])
    pulled = sum(
        float(np.vdot(t.grad, v))
        for t, v in zip(tensors, directions, strict=True)
        if t.grad is not None
    )

    def value(sign: float) -> list[Array]:
        with no_grad():
            moved = fn(
                *(Tensor(x + sign * eps * v) for x, v in zip(inputs, directions, strict=True))
            )
        return [t.data for t in (moved if isinstance(moved, tuple) else (moved,))]

    pushed = sum(
        float(np.vdot(u, (a - b) / (2 * eps)))
        for u, a, b in zip(cotangents, value(1.0), value(-1.0), strict=True)
    )
    error = abs(pushed - pulled) / max(1.0, abs(pushed), abs(pulled))
    if not error <= tol:
        raise ArithmeticError(
            f"gradient check failed: <u, J v> = {pushed!r} but <J^T u, v> = {pulled!r} (relative "
            f"error {error:.2e}, tolerance {tol:.0e})"
        )
    return error
