"""Data parallelism within a node: ranks that share memory hold one copy of the parameters and
reduce without messages.

The parameters and the optimizer's state of a stage exist once on each node, in a window of shared
memory; every rank has its gradients in a window too, where the others can read them. A step of n
ranks: each computes its gradients; a barrier; rank r adds up share r of all n gradients, and their
squares on the way; rank r updates share r of the parameters with share r of the optimizer's state;
a barrier. No all-reduce, no all-gather, and the work of the optimizer is divided by n (the idea of
MPI-3 shared memory, Hoefler et al. 2013, doi:10.1007/s00607-013-0324-2, applied to a sharded update
as in ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054).

With several nodes, the ranks that have the same share on their nodes all-reduce it among themselves
before the update, so each byte crosses the network once for each node, not for each rank. Every
node updates its own copy.

Sums are taken in the order of the ranks. A rank's next backward pass may not overwrite a gradient
that another still reads, and no rank may read parameters half updated: the first barrier of a step
covers evaluation and checkpoints since the last, the agreement on the loss covers the reading of
gradients, the second barrier the update.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.arrays import ALIGNMENT, Array
from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator, SharedWindow
from minillm.comm.ledger import ledger
from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.params.storage import FlatBuffers, Memory, PrivateMemory, Run, overlap
from minillm.replication.all_reduce import by_counting, sum_tied_copies

SHARED_FOLDER = Path("/dev/shm")  # where MPI libraries keep windows on Linux
SPARE_BYTES = 64 << 20  # of shared memory, left for MPI's own messages


@dataclass(frozen=True)
class NodeGroup:
    """The data-parallel replicas of one node, and those that have this rank's place on the other
    nodes."""

    node: Communicator
    peers: Communicator


class NodeMemory:
    """The `Memory` of a node's replicas: windows that all of them address."""

    device = CPU

    def __init__(self, group: NodeGroup) -> None:
        self.group = group
        self.rank, self.size = group.node.rank, group.node.size
        self.description = (
            f"parameters and optimizer state shared by {self.size} ranks of each node"
        )
        self._windows: list[tuple[Array, SharedWindow]] = []

    def common(self, size: int, dtype: np.dtype) -> Array:
        """See `Memory`. It lies in the window of the first rank."""
        return self._allocate(size if self.rank == 0 else 0, dtype, of=0)

    def own(self, size: int, dtype: np.dtype) -> Array:
        """See `Memory`."""
        return self._allocate(size, dtype, of=self.rank)

    def everyones(self, array: Array) -> list[Array]:
        """What the ranks of the node hold where this one holds `array`, which `own` has made, in
        rank order."""
        window = next(window for made, window in self._windows if made is array)
        return [part.view(array.dtype) for part in window.parts]

    def sync(self) -> None:
        """See `Memory`."""
        self._windows[0][1].sync()

    def _allocate(self, size: int, dtype: np.dtype, of: int) -> Array:
        window = self.group.node.alloc_shared(size * dtype.itemsize)
        array = window.parts[of].view(dtype)
        self._windows.append((array, window))
        return array


def choose_memory(
    mesh: Mesh, wanted: str, num_values: int, dtype: np.dtype, device: Device = CPU
) -> Memory:
    """Shared memory for buffers of `num_values` elements if `wanted` ("auto", "on", "off") and the
    machine allow it, else private memory; on a GPU always private. Collective over the mesh.

    Raises ConfigError on every rank if it is "on" but impossible.
    """
    if device is not CPU:
        return PrivateMemory(device.describe(), device)
    replicas = mesh.axis(*TOKEN_AXES)
    if wanted == "off" or (wanted == "auto" and replicas.size == 1):
        return PrivateMemory()
    node = replicas.split_by_node()
    own = (
        num_values * dtype.itemsize * (1 + 3 / node.size)
    )  # its gradients, its share of the parameters and of AdamW's state
    needed = mesh.world.split_by_node().all_reduce_(np.array([own]), kind="control")
    problem = _obstacle(
        mesh.world.gather_json(
            [node.size, node.rank, replicas.rank, float(needed[0]), _free_bytes()]
        )
    )
    if problem and wanted == "on":
        raise ConfigError(f"--node-shared on: {problem}; use --node-shared off")
    if problem:
        return PrivateMemory(f"not shared within nodes: {problem}")
    peers = replicas.split(node.rank, replicas.rank, f"{replicas.name} between nodes")
    assert peers is not None
    group = NodeGroup(node.dup(f"{replicas.name} in node"), peers)
    return NodeMemory(group)


def _obstacle(places: list[list[Any]]) -> str:
    """Why the replicas cannot share memory; empty if they can. `places` holds for every rank of the
    mesh: how many of its replicas are on its node, its place among them and among all replicas, the
    bytes that its node needs of shared memory, and the bytes free there."""
    sizes = sorted({place[0] for place in places})
    if sizes == [1]:
        return "every data-parallel rank is on a node of its own"
    if len(sizes) > 1:
        return (
            f"nodes hold different numbers of data-parallel ranks ({' and '.join(map(str, sizes))})"
        )
    if len({(place[1], place[2]) for place in places}) > len({place[2] for place in places}):
        return "the ranks of a replica have different places on their nodes"
    for *_, needed, free in places:
        if needed + SPARE_BYTES > free:
            return f"{SHARED_FOLDER} has {free / 1e6:.0f} MB free where {(needed + SPARE_BYTES) / 1e6:.0f} MB are needed"
    return ""


def _free_bytes() -> int:
    return shutil.disk_usage(SHARED_FOLDER).free if SHARED_FOLDER.is_dir() else sys.maxsize


@dataclass(frozen=True)
class Piece:
    """A part of this rank's share that is reduced at once."""

    part: slice
    run: Run
    counts: bool  # whether this rank counts it in the norm


class NodeReducer:
    """The `Reducer` of ranks that share memory: nothing happens before all have finished their
    backward pass."""

    observer = None

    def __init__(
        self, buffers: FlatBuffers, mesh: Mesh, memory: NodeMemory, piece_bytes: int
    ) -> None:
        self.buffers, self.mesh, self.memory = buffers, mesh, memory
        self.node, self.peers = memory.group.node, memory.group.peers
        self.exposed_seconds = 0.0
        self.pieces = list(self._cut(max(1, piece_bytes // buffers.grads.itemsize)))
        self._grads = memory.everyones(buffers.grads)
        self._squares = 0.0

    def _cut(self, length: int) -> Iterator[Piece]:
        step = ALIGNMENT // self.buffers.grads.itemsize
        length = max(1, length // step) * step
        for run, part in self.buffers.shared_runs():
            for zone, counts in by_counting(self.buffers, self.mesh):
                whole = overlap(part, zone)
                for start in range(whole.start, whole.stop, length):
                    yield Piece(slice(start, min(start + length, whole.stop)), run, counts)

    def start_step(self) -> None:
        """See `Reducer`."""
        self.buffers.start_step()

    def tie_reduce(self) -> None:
        """See `Reducer`."""
        sum_tied_copies(self.buffers, self.mesh)

    def finish(self) -> None:
        """See `Reducer`. Afterwards this rank's share of its gradients holds the sum, and the rest
        of them nothing of use."""
        started = time.perf_counter()
        for slot in self.buffers.slots:
            slot.finish()
        self.memory.sync()
        works = []
        self._squares = 0.0
        for piece in self.pieces:
            squares = self._sum_over_node(piece)
            if self.peers.size > 1:
                works.append(self.peers.iall_reduce_(self.buffers.grads[piece.part]))
            elif piece.counts and not piece.run.partial_over:
                self._squares += squares
        for work in works:
            work.wait()
        for piece in self.pieces:
            self._sum_over_mesh(piece)
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> float:
        """See `Reducer`. All nodes hold the same sums: the first one counts."""
        return self._squares if self.peers.rank == 0 else 0.0

    def _sum_over_node(self, piece: Piece) -> float:
        """Returns the sum of squares of the sum."""
        parts = [grads[piece.part] for grads in self._grads]
        started = time.perf_counter()
        squares = kernels.sum_arrays(parts[self.node.rank], parts)
        read = (len(parts) - 1) * parts[0].nbytes
        ledger().record(
            self.node.name, "sum", "window", read, time.perf_counter() - started, self.node.size
        )
        return squares

    def _sum_over_mesh(self, piece: Piece) -> None:
        """What is left where the sum over this node's replicas is not all."""
        if self.peers.size == 1 and not piece.run.partial_over:
            return
        part = self.buffers.grads[piece.part]
        for axis in piece.run.partial_over:
            if axis not in TOKEN_AXES:
                self.mesh.axis(axis).all_reduce_(part)
        if piece.counts:
            self._squares += kernels.sum_of_squares(part)
