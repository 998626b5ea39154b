"""Dropout with masks that are functions of global addresses, the same on every mesh."""

from __future__ import annotations

import numpy as np

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base import rng
from minillm.params.module import Module
from minillm.params.where import Pass, Where


class Dropout(Module):
    """Dropout (Srivastava et al. 2014) with probability `p`; the rest is scaled by 1 / (1 - p).

    The mask is a function of (seed, this module's name, step, sample, global time, channel). It is
    the same on any mesh and in any replay, and needs no state.
    """

    def __init__(self, p: float, seed: int) -> None:
        self.p = p
        self.seed = seed

    def key(self, where: Where) -> int:
        """Return the 64-bit key of this module's masks in this step."""
        return rng.key(self.seed, "dropout", self.name, where.step)

    def idle(self, pass_: Pass) -> bool:
        """Return whether everything passes."""
        return not self.p or not pass_.training

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Drop elements of x [B, T_local, D] while training."""
        if self.idle(pass_):
            return x
        where = pass_.where
        samples, times = where.addresses()
        channels = where.device.constant(("channels", x.shape[-1]), lambda: np.arange(x.shape[-1]))
        return ops.dropout(
            x, self.p, key=self.key(where), samples=samples, times=times, channels=channels
        )
