"""Interfaces between models and what trains or runs them.

The pipeline knows a model as a `StageModel` and its input as a `Batch`. The engine builds models
through an `Architecture`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.comm.communicator import Communicator
from minillm.layout.sharding import ShardSpec
from minillm.parallel.tensor import Region
from minillm.params.module import M
from minillm.params.parameter import Parameter
from minillm.params.where import KeyLimits, Where

INIT_STD = 0.02  # of initial weights, unless a test asks for another


class ArraySpec(NamedTuple):
    """Shape and dtype of one array that crosses a pipeline link."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    differentiable: bool  # its gradient travels back: of floats, not of integers


BoundarySpec = tuple[ArraySpec, ...]


class Batch(NamedTuple):
    """One microbatch of one rank."""

    arrays: Mapping[str, Array]  # "tokens" [B, T], "targets" [B, T], ...: on the run's device
    divisors: Mapping[str, float]  # loss name -> count over the global batch that divides its sum
    where: Where  # addresses of the whole sequences, before any cut along time
    limits: KeyLimits | None = None  # padding and document starts; None where there are neither
    cache: Mapping[str, Any] | None = None
    """Layer's name -> its memory of earlier positions: a KV cache, or the state of a recurrent
    layer. A batch with a cache, even one without layers, is not cut along time: single positions
    cannot be."""
    memory: KeyLimits | None = None  # of the array "source" that cross-attention reads, if any
    replicas: Communicator | None = None  # ranks of a `Joint` model's loss; None: this one alone


class StageResult(NamedTuple):
    """Outcome of one stage's forward pass on a microbatch."""

    outputs: tuple[Tensor, ...]  # the next stage receives them
    losses: Mapping[str, Tensor]  # float64 scalars, each divided; backward starts from them at 1


class StageModel(Protocol):
    """Model part of one pipeline stage: all that the pipeline knows of a model."""

    def parameters(self) -> list[Parameter]:
        """Return every parameter once, in an order that is the same on every rank."""

    def receives(self, batch: Batch) -> BoundarySpec:
        """Describe the arrays that the previous stage hands on; () on a first stage."""

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Compute this stage from what `arrived`, as `receives` describes it.

        A stage computes those of its losses that `batch.divisors` names. `training` enables
        dropout, not the tape.
        """


@runtime_checkable
class Joint(StageModel, Protocol):
    """Stage model whose loss compares the examples of a whole step, over all its replicas.

    The loss of the only microbatch of each replica is computed in its pass. For several, a first
    pass without a tape finds the last stage's outputs, and the second one gets loss and gradient.
    """

    def join(
        self, outputs: Sequence[Array], batches: Sequence[Batch], replicas: Communicator
    ) -> list[Batch]:
        """Return `batches`, of which the first pass found `outputs`, with what their losses need.

        Called on a last stage. Collective over `replicas`.
        """


class Decoder(StageModel, Protocol):
    """Stage model that generates text."""

    context: int  # most positions that it can read

    def modules(self, kind: type[M]) -> Iterator[M]:
        """Yield its modules of a type, such as the attention layers that need a cache."""

    def logits(self, outputs: tuple[Tensor, ...], batch: Batch, *, whole: bool = True) -> Array:
        """Return the logits [B, T, V] of a last stage's outputs.

        They are `whole` on every tp rank, or those of the rank's own rows of the vocabulary.
        """


class StagePart(NamedTuple):
    """Share of a model that one stage holds."""

    layers: range
    first: bool  # holds what comes before the layers: embeddings
    last: bool  # holds what comes behind the layers: final norm and head


class Workload(NamedTuple):
    """One microbatch on one rank, as far as its memory is concerned."""

    tokens: int
    tp: int  # ranks that the layers are cut over
    sequence_parallel: bool
    recompute: str  # "none", "selective" or "full"
    itemsize: int  # bytes of an activation
    on_gpu: bool


class Architecture(Protocol):
    """Family of models that the engine can build."""

    name: str

    def build(
        self, config: Any, part: StagePart, region: Region, *, seed: int, recompute: str, std: float
    ) -> StageModel:
        """Build one stage's model. No memory is allocated for its parameters."""

    def specs(self, config: Any) -> Mapping[str, ShardSpec]:
        """Return the layout of every parameter of the whole model by global name."""

    def ties(self, config: Any, stages: Sequence[range]) -> Mapping[str, tuple[int, ...]]:
        """Return the stages that hold a copy of each parameter that several stages share.

        `stages` are the layers of each stage.
        """

    def activation_bytes(self, config: Any, num_layers: int, work: Workload) -> int:
        """Return the bytes that the tape keeps of one microbatch in `num_layers` on a rank."""

    def workspace_bytes(self, config: Any, work: Workload, *, last: bool) -> int:
        """Return the bytes of temporaries on a rank, which holds the `last` stage or does not."""

    def head_bytes(self, config: Any, work: Workload) -> int:
        """Return the bytes that exist at once in the head and its loss."""


def num_parameters(architecture: Architecture, config: Any) -> int:
    """Return the number of trainable values: a tied weight counts once, padding not at all."""
    return sum(math.prod(spec.shape) for spec in architecture.specs(config).values())
