"""Timed calls of a training step: layernorm."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    x, grad = (sizes.normals(sizes.rows, sizes.dim) for _ in range(2))
    weight, bias = (sizes.normals(sizes.dim) for _ in range(2))
    _, mean, rstd = kernels.layernorm_forward(x, weight, bias, 1e-5)
    yield Call(kernels.layernorm_forward, 2 * x.nbytes, x, weight, bias, 1e-5)
    yield Call(kernels.layernorm_backward, 3 * x.nbytes, grad, x, weight, mean, rstd)
