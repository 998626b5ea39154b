"""Dropout whose mask is a function of global positions, so that every mesh drops the same
elements."""

from __future__ import annotations

import numpy as np

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base import rng
from minillm.params.module import Module
from minillm.params.where import Where


class Dropout(Module):
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p) (Srivastava et al.
    2014).

    The choice is addressed by (seed, this module's name, step, sample, global time, channel): no
    state, and the same on any mesh and in any replay.
    """

    def __init__(self, p: float, seed: int) -> None:
        self.p = p
        self.seed = seed
        self.training = True

    def key(self, where: Where) -> int:
        """The 64-bit key of this module's masks in this step."""
        return rng.key(self.seed, "dropout", self.name, where.step)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T_local, D] -> the same shape."""
        if not self.p or not self.training:
            return x
        samples, times = where.addresses()
        channels = where.device.constant(("channels", x.shape[-1]), lambda: np.arange(x.shape[-1]))
        return ops.dropout(
            x, self.p, key=self.key(where), samples=samples, times=times, channels=channels
        )
