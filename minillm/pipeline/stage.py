"""One pipeline stage on one rank: its part of the model, the memory of its parameters, and the
reducer of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minillm.autograd.backward import WeightGradWork
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.models.gpt import GPT
from minillm.params.where import Where
from minillm.params.storage import FlatBuffers
from minillm.replication.all_reduce import Reducer


class ArraySpec(NamedTuple):
    """One array of what a stage hands on."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    differentiable: bool


BoundarySpec = tuple[ArraySpec, ...]


class Microbatch(NamedTuple):
    """This rank's share of one microbatch: token ids and targets [B, T], and where they sit in the
    global batch."""

    inputs: Array
    targets: Array
    where: Where


@dataclass
class Live:
    """What a stage keeps of a microbatch between its forward and its backward pass."""

    source: tuple[Tensor, ...]
    result: tuple[Tensor, ...]
    deferred: list[WeightGradWork] = field(default_factory=list)


@dataclass
class Stage:
    """Stage `index` of the pipeline. `reducer` is None where nothing is trained."""

    index: int
    model: GPT
    buffers: FlatBuffers
    reducer: Reducer | None

    @property
    def first(self) -> bool:
        """Whether this stage embeds the tokens."""
        return self.model.embedding is not None

    @property
    def last(self) -> bool:
        """Whether this stage computes the loss."""
        return self.model.head is not None

    def boundary(self, where: Where) -> BoundarySpec:
        """The arrays that cross each link of the pipeline: hidden states [B, T_local, D] of this
        rank's time shard."""
        outside = self.model.region.outside(where)
        assert outside.times is not None
        shape = (len(where.samples), len(outside.times), self.model.config.dim)
        return (ArraySpec("hidden", shape, self.buffers.values.dtype, True),)

    def forward(
        self, arrived: Sequence[Array] | None, microbatch: Microbatch, divisor: float
    ) -> Live:
        """Run the stage on a microbatch; the last stage's result is its loss, a float64 scalar."""
        if self.first:
            source: tuple[Tensor, ...] = ()
            hidden = self.model(microbatch.inputs, microbatch.where)
        else:
            assert arrived is not None
            source = tuple(Tensor(array, True) for array in arrived)
            hidden = self.model(source[0], microbatch.where)
        result = self.model.loss(hidden, microbatch.targets, divisor) if self.last else hidden
        return Live(source, (result,))
