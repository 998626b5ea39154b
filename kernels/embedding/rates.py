"""Timed calls of a training step: embedding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    ids = np.random.default_rng(0).integers(0, sizes.vocab, sizes.rows)
    rows, grad = sizes.normals(sizes.vocab, sizes.dim), sizes.normals(sizes.rows, sizes.dim)
    yield Call(kernels.embedding_forward, 2 * grad.nbytes, ids, rows)
    yield Call(kernels.embedding_backward_, 3 * grad.nbytes, grad, ids, rows)
