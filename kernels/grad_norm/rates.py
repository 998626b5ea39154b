"""Timed calls of a training step: grad_norm."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    grad = sizes.normals(8 << 20)  # 32 MB, beyond every cache
    yield Call(kernels.sum_of_squares, grad.nbytes, grad)
