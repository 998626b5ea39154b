"""Data parallelism in shared memory: the ranks of a node hold one copy of the parameters.

Parameters and optimizer state of a stage exist once a node, in a window of MPI-3 shared memory
(Hoefler et al. 2013, doi:10.1007/s00607-013-0324-2). Each rank has its gradients in a window that
the others can read. The update is sharded as in ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

A step of n ranks:
1. Each rank computes its gradients. Barrier A.
2. Rank r sums share r of all n gradients, in rank order, and the squares of the sum.
3. All ranks agree on the loss.
4. Rank r updates share r of the parameters. Barrier B.

There is no all-reduce and no all-gather inside a node. Between nodes, the ranks with equal shares
all-reduce them before the update, so each byte crosses the network once a node.

Three synchronisations protect three hazards. Barrier A: gradients are complete before another rank
reads them. The agreement: all reads end before the next backward pass writes. Barrier B: parameters
are updated before the next forward pass.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.arrays import ALIGNMENT, Array
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator, SharedWindow
from minillm.comm.ledger import ledger
from minillm.comm.mesh import Mesh
from minillm.layout.flat import FlatLayout, Run
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.layout.placement import Layout
from minillm.layout.sharding import overlap
from minillm.params.storage import FlatBuffers, PrivateMemory, WholeMemory
from minillm.replication.all_reduce import AllReduce, counted_parts
from minillm.replication.costs import Bytes, DataAxis, common
from minillm.replication.method import Method, Setting
from minillm.replication.protocol import Replication

SHARED_FOLDER = Path("/dev/shm")  # where MPI libraries keep windows on Linux
SPARE_BYTES = 64 << 20  # of shared memory, left for MPI's own messages


@dataclass(frozen=True)
class NodeGroup:
    """Replicas on this node, and the replicas with this rank's place on the other nodes."""

    node: Communicator
    peers: Communicator


class NodeMemory(WholeMemory):
    """Memory of the replicas of one node: windows that all of them address."""

    def __init__(self, group: NodeGroup) -> None:
        self.group = group
        self.rank, self.size = self.alias = group.node.rank, group.node.size
        self.description = (
            f"parameters and optimizer state shared by {self.size} ranks of each node"
        )
        self._windows: list[tuple[Array, SharedWindow]] = []

    def common(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size] in the window of the node's first rank."""
        return self._allocate(size if self.rank == 0 else 0, dtype, of=0)

    def own(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size] in this rank's window."""
        return self._allocate(size, dtype, of=self.rank)

    def everyones(self, array: Array) -> list[Array]:
        """Return the node's arrays, in rank order, that correspond to `array`, made by `own`."""
        window = next(window for made, window in self._windows if made is array)
        return [part.view(array.dtype) for part in window.parts]

    def sync(self) -> None:
        """Barrier of the node."""
        self._windows[0][1].sync()

    def _allocate(self, size: int, dtype: np.dtype, of: int) -> Array:
        window = self.group.node.alloc_shared(size * dtype.itemsize)
        array = window.parts[of].view(dtype)
        self._windows.append((array, window))
        return array


def find_group(mesh: Mesh, num_values: int, dtype: np.dtype) -> NodeGroup | str:
    """Return the group that can share buffers of `num_values` elements, or why none can.

    Collective over the mesh; all ranks get a group, or the same reason.
    """
    replicas = mesh.axis(*TOKEN_AXES)
    node = replicas.split_by_node()
    # Its gradients, and its share of the parameters and of AdamW's two moments.
    own = num_values * dtype.itemsize * (1 + 3 / node.size)
    needed = mesh.world.split_by_node().all_reduce_(np.array([own]), kind="control")
    places = [node.size, node.rank, replicas.rank, float(needed[0]), free_shared_bytes()]
    problem = _obstacle(mesh.world.gather_json(places))
    if problem:
        return problem
    peers = replicas.split(node.rank, replicas.rank, f"{replicas.name} between nodes")
    assert peers is not None
    return NodeGroup(node.dup(f"{replicas.name} in node"), peers)


def _obstacle(places: list[list[Any]]) -> str:
    """Return why the replicas cannot share memory; empty if they can.

    `places` holds for each rank of the mesh: the number of its replicas on its node, its place
    among them and among all replicas, the bytes of shared memory its node needs, and those free.
    """
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
        wanted = needed + SPARE_BYTES
        if wanted > free:
            have, want = f"{free / 1e6:.0f} MB free", f"{wanted / 1e6:.0f} MB are needed"
            return f"{SHARED_FOLDER} has {have} where {want}"
    return ""


def free_shared_bytes() -> int:
    """Return the free bytes of the node's shared memory."""
    return shutil.disk_usage(SHARED_FOLDER).free if SHARED_FOLDER.is_dir() else sys.maxsize


@dataclass(frozen=True)
class Piece:
    """Part of this rank's share that is summed at once."""

    part: slice
    run: Run
    counts: bool  # in the norm, on this rank


class NodeShared(Replication):
    """Replicas that share one copy of the parameters on each node."""

    memory: NodeMemory

    def __init__(self, mesh: Mesh, layout: Layout, memory: NodeMemory, piece_bytes: int) -> None:
        super().__init__(mesh, layout, memory)
        self.node, self.peers = memory.group.node, memory.group.peers
        self.piece_bytes = piece_bytes

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Cut this rank's share of each stage into pieces."""
        super().attach(buffers)
        self.pieces = {stage: list(self._cut(stage, b)) for stage, b in buffers.items()}
        self._grads = {stage: self.memory.everyones(b.grads) for stage, b in buffers.items()}
        self._squares: dict[int, Any] = {}

    def _cut(self, stage: int, buffers: FlatBuffers) -> Iterator[Piece]:
        step = ALIGNMENT // buffers.grads.itemsize
        length = max(1, self.piece_bytes // buffers.grads.itemsize // step) * step
        zones = list(
            counted_parts(buffers.layout, self.layout, stage, self.mesh.coords, axes=("tp",))
        )
        for run, part in buffers.shared_runs():
            for zone, counts in zones:
                whole = overlap(part, zone)
                for start in range(whole.start, whole.stop, length):
                    yield Piece(slice(start, min(start + length, whole.stop)), run, counts)

    def reduce(self, stage: int) -> None:
        """Sum this rank's share of the stage's gradients over all replicas.

        Afterwards the rest of its gradient buffer is undefined.
        """
        started = time.perf_counter()
        super().reduce(stage)
        self.memory.sync()
        works, squares = [], 0.0
        grads = self.buffers[stage].grads
        for piece in self.pieces[stage]:
            found = self._sum_over_node(stage, piece)
            if self.peers.size > 1:
                works.append(self.peers.iall_reduce_(grads[piece.part]))
            elif piece.counts and not _beyond_tokens(piece.run):
                squares += found
        for work in works:
            work.wait()
        for piece in self.pieces[stage]:
            squares += self._sum_over_mesh(grads[piece.part], piece)
        self._squares[stage] = squares
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> Any:
        """Return the squared norm of this rank's share; of all nodes the first one counts."""
        return sum(self._squares.values()) if self.peers.rank == 0 else 0.0

    def _sum_over_node(self, stage: int, piece: Piece) -> float:
        """Sum a piece over the node in place; return the sum of squares of the result."""
        parts = [grads[piece.part] for grads in self._grads[stage]]
        started = time.perf_counter()
        squares = kernels.sum_arrays(parts[self.node.rank], parts)
        read = (len(parts) - 1) * parts[0].nbytes
        ledger().record(
            self.node.name, "sum", "window", read, time.perf_counter() - started, self.node.size
        )
        return squares

    def _sum_over_mesh(self, part: Array, piece: Piece) -> float:
        """Finish a piece whose sum over this node is not all; return its squares if counted."""
        beyond = _beyond_tokens(piece.run)
        if self.peers.size == 1 and not beyond:
            return 0.0
        for axis in beyond:
            self.mesh.axis(axis).all_reduce_(part)
        return kernels.sum_of_squares(part) if piece.counts else 0.0


def _beyond_tokens(run: Run) -> tuple[str, ...]:
    """Return the reduction axes over which the replicas of the token axes do not extend."""
    return tuple(axis for axis in run.sum_axes if axis not in TOKEN_AXES)


def _make(setting: Setting) -> Replication:
    """Return the method, or all-reduce with the reason where sharing is impossible.

    Raises ConfigError on every rank if --node-shared is on and it is.
    """
    mesh, layout, bucket_bytes = setting.mesh, setting.layout, setting.bucket_bytes
    group = find_group(mesh, setting.num_values, setting.dtype)
    if not isinstance(group, str):
        return NodeShared(mesh, layout, NodeMemory(group), bucket_bytes)
    if METHOD.asked(setting.options):
        raise ConfigError(f"--node-shared on: {group}; use --node-shared off")
    return AllReduce(mesh, layout, PrivateMemory(f"not shared within nodes: {group}"), bucket_bytes)


def _sends(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Read this rank's share of the other ranks' gradients; all-reduce it between nodes."""
    ways, found = axis.shared_by, Bytes()
    (cuts,), place = layout.cuts([slice(0, layout.size)], ways), axis.rank % ways
    part = slice(cuts[place], cuts[place + 1])
    size = sum(common(run, part) for run in layout.runs) * axis.wide
    found["dp in node", "sum"] = (ways - 1) * size
    if axis.mesh.dp > ways:
        found["dp between nodes", "all_reduce"] = size
    return found


METHOD = Method(
    name="node-shared",
    option="node_shared",
    unasked=("auto", "off"),
    lost=lambda options: "memory that a lost rank shared is not safe to use",
    make=_make,
    sends=_sends,
    uneven=lambda options: True,
    goes_with="--tp, --sequence-parallel and --pp",
    compared={"node-shared": {"node_shared": "on"}},
)
