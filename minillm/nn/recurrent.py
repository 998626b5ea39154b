"""Recurrent layer with its hidden units cut over tp, and the state that it carries."""

from __future__ import annotations

import math

import numpy as np

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.base.device import Device
from minillm.layout.sharding import Segment, ShardSpec
from minillm.ops.recurrent import CELLS
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.where import Pass


class Recurrence(Module):
    """Recurrent layer (`cell`: "lstm" or "rnn") from `in_size` channels to `hidden` units.

    A rank computes hidden / tp units of each gate, from the whole h of the step before. The pass
    may hold an array [S, B, H_local] under the layer's name: the states before the window, which
    the layer overwrites by those behind it. Without one they begin at zero.

    Initial weights have the variance of PyTorch's, 1 / (3 hidden). The one bias is the sum of its
    two.
    """

    def __init__(
        self, cell: str, in_size: int, hidden: int, region: Region, *, recompute: bool = False
    ) -> None:
        self.cell, self.hidden, self.region, self.recompute = CELLS[cell], hidden, region, recompute
        units = (Segment(hidden, ("tp",)),) * self.cell.num_gates
        size, init = hidden * self.cell.num_gates, Normal(1 / math.sqrt(3 * hidden))
        self.w_in = Parameter(
            ShardSpec((size, in_size), (units, (Segment(in_size),))), init, decay=True
        )
        self.w_rec = Parameter(
            ShardSpec((size, hidden), (units, (Segment(hidden),))), init, decay=True
        )
        self.bias = Parameter(ShardSpec((size,), (units,)), Constant(0.0), decay=False)

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Unroll over x [B, T, D], replicated over tp: h [B, T, H], replicated likewise."""
        first = None if pass_.cache is None else pass_.cache.get(self.name)
        return ops.recurrent(
            self.region.enter(x, pass_),
            self.w_in,
            self.w_rec,
            self.bias,
            cell=self.cell,
            first=self.states(x.shape[0], x.dtype, pass_.where.device) if first is None else first,
            last=first,
            comm=self.region.comm,
            recompute=self.recompute,
        )

    def states(self, rows: int, dtype: np.dtype, device: Device) -> Array:
        """Return states of `rows` sequences at their beginning: zeros [S, B, H_local]."""
        units = self.hidden // self.region.comm.size
        return device.xp.zeros((self.cell.num_states, rows, units), dtype)

    def states_spec(self, rows: int) -> ShardSpec:
        """Return the layout of the states of a global batch: replicas hold a block of rows each."""
        parts = (self.cell.num_states, rows, self.hidden)
        axes: tuple[tuple[str, ...], ...] = ((), ("dp", "ep"), ("tp",))
        dims = tuple((Segment(*part),) for part in zip(parts, axes, strict=True))
        return ShardSpec(parts, dims)
