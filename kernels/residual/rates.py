"""Timed calls of a training step: residual."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    x, y = (sizes.normals(sizes.rows, sizes.dim) for _ in range(2))
    yield Call(kernels.add, 3 * x.nbytes, x, y)
    wide, bias = sizes.normals(sizes.rows, 3 * sizes.dim), sizes.normals(3 * sizes.dim)
    yield Call(kernels.add_bias_, 2 * wide.nbytes, wide, bias)
