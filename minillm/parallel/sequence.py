"""Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): norms, dropout and residuals
sharded along time over the tensor-parallel ranks.

Tensor parallelism leaves everything between the matrix products replicated: each of the tp ranks
normalises the same activations. Here each rank keeps 1/tp of the time steps there. The all-reduce
at each end of a block's parallel part becomes a reduce-scatter on the way out and an all-gather on
the way in, which together move the same bytes; activations between blocks (and between pipeline
stages) shrink by tp. Parameters of the sharded region (norms, biases after the reduction,
positions) see only some time steps, so their gradients are partial sums over tp: `partial_over`.
"""

from __future__ import annotations

from minillm.autograd.tape import Tensor
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.parallel.collectives import all_gather, reduce_scatter
from minillm.params.where import Where


class SequenceParallel:
    """The tensor-parallel part of a model with its surroundings sharded along time. Same interface
    as `TensorParallel`."""

    partial_over: tuple[str, ...] = ("tp",)

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def enter(self, x: Tensor) -> Tensor:
        """x_shard_t [B, T/tp, D] -> [B, T, D], into a column-parallel product."""
        return all_gather(x, self.comm, 1)

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums [B, T, D] -> x_shard_t [B, T/tp, D], out of a row-parallel product."""
        return reduce_scatter(x, self.comm, 1)

    def outside(self, where: Where) -> Where:
        """The Where of this rank's time shard, from that of the whole sequence. Raises ConfigError
        if the time steps do not divide."""
        if where.times is None:
            raise ConfigError(
                "sequence parallelism shards along time, but these data have no time dim"
            )
        if len(where.times) % self.comm.size:
            raise ConfigError(
                f"{len(where.times)} time steps cannot be cut into {self.comm.size} equal shards; "
                "choose a context that tp divides"
            )
        size = len(where.times) // self.comm.size
        times = where.times[self.comm.rank * size : (self.comm.rank + 1) * size]
        return Where(where.step, where.samples, times, gathered=where, device=where.device)
