"""Sequence parallelism: norms, dropout and residuals sharded along time over the tp ranks.

Source: Korthikanti et al. 2022, arXiv:2205.05198. Tensor parallelism leaves everything between the
matrix products replicated: each of the tp ranks normalises the same activations. Here each rank
keeps 1/tp of the time steps there. The all-reduce at each end of a block's parallel part becomes a
reduce-scatter on the way out and an all-gather on the way in, which together move the same bytes.
Activations between blocks, and between pipeline stages, shrink by tp. Parameters of the sharded
part (norms, biases after the reduction, positions) see only some time steps, so their gradients are
partial sums over tp: `partial_over`.

Rows of unequal data may be shorter than tp. Every rank then holds one time step outside the region.
Steps behind the last one are padding: they count on from it, and `enter` leaves them out.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.errors import ConfigError
from minillm.comm.buffers import even_counts
from minillm.comm.communicator import Communicator
from minillm.ops import lengthened, shortened
from minillm.parallel.collectives import all_gather, copy_to, reduce_from, reduce_scatter
from minillm.parallel.tensor import Group
from minillm.params.where import Pass


class SequenceParallel:
    """Region whose surroundings are sharded along time.

    A pass that did not go through `outside` is replicated instead, as in `TensorParallel`: single
    positions, as in generation, cannot be sharded.
    """

    partial_over: tuple[str, ...] = ("tp",)

    def __init__(self, comm: Group) -> None:
        self.comm = cast(Communicator, comm)  # planning needs no more than a Group

    def outside(self, pass_: Pass) -> Pass:
        """Return the pass of this rank's time shard, from that of whole sequences.

        Shards differ by one step where the ranks do not divide the steps, as in rows of unequal
        data. Raises ConfigError for data without a time dim.
        """
        whole = pass_.whole
        if whole.times is None:
            raise ConfigError(
                "sequence parallelism shards along time, but these data have no time dim"
            )
        sizes, times = self._sizes(pass_), whole.times
        if (more := sum(sizes) - times.shape[-1]) > 0:
            behind = times[..., -1:] + np.arange(1, more + 1)
            times = np.concatenate([times, behind], -1)
        start = sum(sizes[: self.comm.rank])
        times = times[..., start : start + sizes[self.comm.rank]]
        return dataclasses.replace(pass_, where=dataclasses.replace(whole, times=times))

    def _sizes(self, pass_: Pass) -> list[int]:
        """Return the number of time steps of each rank, padding included: at least one."""
        assert pass_.whole.times is not None
        return even_counts(max(pass_.whole.times.shape[-1], self.comm.size), self.comm.size)

    def enter(self, x: Tensor, pass_: Pass) -> Tensor:
        """All-gather x_shard_t [B, T/tp, D] -> [B, T, D]."""
        if pass_.where is pass_.whole:
            return copy_to(x, self.comm)
        assert pass_.whole.times is not None
        found = all_gather(x, self.comm, 1, self._sizes(pass_))
        return shortened(found, 1, pass_.whole.times.shape[-1])

    def leave(self, x: Tensor, pass_: Pass) -> Tensor:
        """Reduce-scatter partial sums [B, T, D] -> x_shard_t [B, T/tp, D]."""
        if pass_.where is pass_.whole:
            return reduce_from(x, self.comm)
        sizes = self._sizes(pass_)
        return reduce_scatter(lengthened(x, 1, sum(sizes)), self.comm, 1, sizes)
