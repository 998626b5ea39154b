"""Timed calls of a training step: matmul."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    R, D, F = sizes.rows, sizes.dim, 4 * sizes.dim
    x, wide, matrix = sizes.normals(R, D), sizes.normals(R, F), sizes.normals(F, D)
    num_bytes = x.nbytes + wide.nbytes + matrix.nbytes
    yield Call(kernels.column_sum, wide.nbytes, wide)
    yield Call(kernels.matmul, num_bytes, x, matrix.T, flops=2.0 * R * D * F)
