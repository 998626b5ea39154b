"""Pipeline stage on one rank: its part of the model, and the memory of its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.autograd.backward import WeightGradWork
from minillm.autograd.tape import Tensor
from minillm.models.protocol import StageModel
from minillm.params.storage import FlatBuffers


@dataclass
class Stage:
    """Stage `index` of the pipeline."""

    index: int
    model: StageModel
    buffers: FlatBuffers


@dataclass
class Live:
    """Tensors of one microbatch that a stage keeps between its forward and its backward pass."""

    arrived: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]  # handed on and differentiable
    losses: tuple[Tensor, ...]
    deferred: list[WeightGradWork] = field(default_factory=list)
