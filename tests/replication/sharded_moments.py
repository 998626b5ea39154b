"""Toy method whose optimizer state is a shard: gradients all-reduced, moments and update sharded.

It shows that state can be a share of the flat buffer, be saved as one, and be resharded. ZeRO adds
the reduce-scatter and the overlap.
"""

from __future__ import annotations

from typing import Any

from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.layout.placement import Layout
from minillm.params.storage import PrivateMemory
from minillm.replication.all_reduce import AllReduce
from minillm.replication.protocol import Optimizer


class ShardedState(PrivateMemory):
    """Private parameters and gradients, with optimizer state for this rank's share alone."""

    axes = TOKEN_AXES
    shards = frozenset({"state"})

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


class ShardedMoments(AllReduce):
    """Replicas that each update their share of the parameters and broadcast it."""

    def __init__(self, mesh: Mesh, layout: Layout) -> None:
        ranks = mesh.axis(*TOKEN_AXES)
        super().__init__(mesh, layout, ShardedState(ranks.rank, ranks.size), bucket_bytes=4000)

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        super().update(optimizer, step, lr, scale)
        ranks = self.mesh.axis(*TOKEN_AXES)
        for buffers in self.buffers.values():
            for owner in range(ranks.size):
                part = buffers.part_of(buffers.zones[0], owner)
                ranks.broadcast_(buffers.values[part], owner)
