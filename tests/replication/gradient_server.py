"""Toy third method of data parallelism: one server rank of each replica group sums the gradients.

It exists to show that a method is one file: no other file of the project names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minillm import kernels
from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.layout.placement import Layout
from minillm.layout.sharding import ShardSpec
from minillm.params.state import StateTensor
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.replication.all_reduce import counted_parts
from minillm.replication.protocol import Optimizer, Replication

SERVER = 0


class GradientServer(Replication):
    """Replicas that send their gradients to a server rank, which sums them and sends the sum back.

    The server counts its updates; the count is part of a checkpoint.
    """

    def __init__(self, mesh: Mesh, layout: Layout) -> None:
        super().__init__(mesh, layout, PrivateMemory("gradients summed by a server rank"))
        self.updates = np.zeros(1)

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        super().attach(buffers)
        self._counted = [
            b.grads[part]
            for stage, b in buffers.items()
            for part, counts in counted_parts(b.layout, self.layout, stage, self.mesh.coords)
            if counts
        ]

    def reduce(self, stage: int) -> None:
        super().reduce(stage)
        for run in self.buffers[stage].layout.runs:
            grads = self.buffers[stage].grads[run.start : run.stop]
            self._through_server(grads)
            for axis in run.sum_axes:
                if axis not in TOKEN_AXES:
                    self.mesh.axis(axis).all_reduce_(grads)

    def _through_server(self, grads: np.ndarray) -> None:
        ranks = self.mesh.axis(*TOKEN_AXES)
        if ranks.size == 1:
            return
        if ranks.rank != SERVER:
            ranks.send(grads, SERVER)
            ranks.recv(grads, SERVER)
            return
        for worker in range(1, ranks.size):
            grads += ranks.recv(np.empty_like(grads), worker)
        for worker in range(1, ranks.size):
            ranks.send(grads, worker)

    def sum_of_squares(self) -> Any:
        return sum(map(kernels.sum_of_squares, self._counted))

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        super().update(optimizer, step, lr, scale)
        self.updates += 1

    def state(self) -> Iterator[StateTensor]:
        yield StateTensor("server/updates", ShardSpec.replicated(1), self.updates)
