"""Timed calls of a training step: softmax_xent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    R, V = sizes.rows, sizes.vocab
    logits, targets = sizes.normals(R, V), np.random.default_rng(0).integers(0, V, R)
    # A shift of 10 keeps the exponentials small when the call repeats in place.
    shift, sums, scale = (np.full(R, number, np.float32) for number in (10, 1, 1e-3))
    yield Call(kernels.xent_max, logits.nbytes, logits)
    yield Call(kernels.xent_shifted_sum_, 2 * logits.nbytes, logits, shift, targets, 0)
    yield Call(kernels.xent_grad_, 2 * logits.nbytes, logits, sums, targets, 0, scale)
