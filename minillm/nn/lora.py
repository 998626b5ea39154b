"""Low-rank adaptation of linear maps (Hu et al. 2022, arXiv:2106.09685).

A map W [out, in] that keeps its values gets an update of rank r beside it, the product of two
factors that train:

    y = x W^T + b + (alpha / r) (x A^T) B^T       A: [r, in], normal; B: [out, r], zero at first

Both factors lie with the map: the one whose dim tensor parallelism cuts is cut likewise, and the
gradients of the other one, which every rank holds whole, are partial sums over tp. So a factor
costs no message in the forward pass. A fused projection, as of queries, keys and values, has one
pair of factors.

Programs that read weights see W + (alpha / r) B A alone (`Merged`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.layout.sharding import Segment, ShardSpec, Slices
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter

if TYPE_CHECKING:
    from minillm.checkpoint import StateSource

FACTORS = ".lora."
"""Part of the names of factors: `blocks.0.mlp.up.lora.a` belongs to `blocks.0.mlp.up.weight`."""


class LowRank(Module):
    """Update of rank `rank` of a linear map, whose weight [out, in] is cut as `spec` says.

    Initial values of A have the variance 1 / (3 in), as in the package peft.
    """

    def __init__(self, spec: ShardSpec, rank: int, scale: float) -> None:
        (out_size, in_size), (out, in_) = spec.shape, spec.dims
        self.scale, between = scale, (Segment(rank),)
        first = Normal(1 / math.sqrt(3 * in_size))
        self.a = Parameter(_factor((rank, in_size), (between, in_)), first, decay=True)
        self.b = Parameter(_factor((out_size, rank), (out, between)), Constant(0.0), decay=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update to y [..., out_local], the product of x [..., in_local] inside the region.

        Where the map sums over tp, its result does so later, and that of this update with it.
        """
        middle = ops.scale(ops.linear(x, self.a), self.scale)  # [..., r]
        return ops.add(y, ops.linear(middle, self.b))


def _factor(shape: tuple[int, int], dims: tuple[tuple[Segment, ...], ...]) -> ShardSpec:
    """Return the layout of a factor: cut over tp, or whole with partial sums as gradients."""
    spec = ShardSpec(shape, dims)
    return spec if spec.axes else ShardSpec(shape, dims, partial_over=("tp",))


def scale_of(rank: int, alpha: float | None) -> float:
    """Return the factor of an update, alpha / rank; without alpha, which is then 2 rank, 2."""
    return 2.0 if alpha is None else alpha / rank


def map_of(name: str) -> str:
    """Return the name of the weight that a factor belongs to; of any other parameter its own."""
    layer, found, _ = name.partition(FACTORS)
    return f"{layer}.weight" if found else name


class Merged:
    """Source without factors: each map is the sum of its weight and their scaled product.

    Implements `StateSource`. Blocks are computed in float64, and rounded once.
    """

    def __init__(self, source: StateSource, scale: float) -> None:
        self.source, self.scale = source, scale
        self._names = frozenset(source.names())

    def __str__(self) -> str:
        return str(self.source)

    def names(self) -> Iterable[str]:
        """Return the names of all tensors but the factors."""
        return [name for name in self.source.names() if FACTORS not in name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of `name`."""
        return self.source.shape(name)

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype."""
        return self.source.dtype(name)

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """Return a block of the global tensor."""
        block = self.source.read(name, global_slices)
        a, b = (f"{name.removesuffix('.weight')}{FACTORS}{factor}" for factor in "ab")
        if a not in self._names:
            return block
        rank = slice(0, self.source.shape(a)[0])
        rows, columns = global_slices
        left, right = self.source.read(b, (rows, rank)), self.source.read(a, (rank, columns))
        update = left.astype(np.float64) @ right.astype(np.float64)
        return (block.astype(np.float64) + self.scale * update).astype(block.dtype)
