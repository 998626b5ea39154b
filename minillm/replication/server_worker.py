"""Workers of a parameter server: replicas that push gradients and pull weights.

Each worker computes the gradient of its own sequences. Servers hold weights and optimizer state, in
key ranges (server.py): dedicated ranks behind those of the mesh, or every worker one range.

`SyncWorker` equals an all-reduce: the servers add the gradients of a clock in the order of the
workers, and the workers agree on the global norm before the servers update.

`FreeWorker` (async, stale) pushes the gradient of its own mean loss, clipped by its own norm, and
pulls weights at once. Every push is one update of the optimizer. Losses are divided by the global
count before backward starts, so a worker's gradient is 1 / d of that of its mean loss; update and
norm take d times it. Between two meetings the workers share nothing else. At a meeting all have
pushed the same number of clocks, and all pull the weights of the servers.

Invariant: a pull writes weights only between two steps, never while a gradient is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.backward import BackwardObserver
from minillm.base.arrays import Array
from minillm.base.errors import CommTimeout
from minillm.base.trace import Tracer
from minillm.comm.communicator import Communicator, Work
from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import TOKEN_AXES, MeshShape
from minillm.layout.placement import Layout
from minillm.layout.sharding import ShardSpec, overlap
from minillm.params.state import StateTensor
from minillm.params.storage import FlatBuffers, FlatState, PrivateMemory
from minillm.replication.all_reduce import counted_grads
from minillm.replication.protocol import MakeOptimizer, Optimizer, Replication
from minillm.replication.server import Server
from minillm.replication.server_messages import DATA, HEADER, REPLY, REPLY_FIELDS, Op, Request
from minillm.replication.server_shards import Shard, key_range, ranges

AXIS = "dp server"  # of messages to and from servers, in the ledger
NO_VERSION = (
    "the servers count their updates from the number of steps on: the checkpoint has no count for "
    "this method and number of workers"
)


class WorkerMemory(PrivateMemory):
    """Memory of a worker: weights and gradients. Of the servers' state it saves one share."""

    shards: frozenset[str] = frozenset({"state"})
    axes: tuple[str, ...] = ("dp",)

    def __init__(self, description: str, rank: int, size: int) -> None:
        super().__init__(description)
        self.rank, self.size = rank, size


class RemoteOptimizer:
    """Optimizer whose state lies on the servers. Implements `Optimizer`."""

    def __init__(self, worker: Worker, names: Sequence[str]) -> None:
        self.worker, self.names = worker, tuple(names)
        self.lent: dict[str, list[FlatState]] = {}

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Do nothing: the servers update."""

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return copies of this worker's share of the state, fetched from the servers."""
        for name in self.names:
            self.lent[name] = [FlatState(b) for b in self.worker.buffers.values()]
        self.exchange(Op.GET)
        return dict(self.lent)

    def exchange(self, op: Op) -> None:
        """Read the copies from the servers (GET), or write them there (SET)."""
        for kind, name in enumerate(self.lent, start=1):
            for stage, state in enumerate(self.lent[name]):
                self.worker.exchange(op, stage, kind, state.array)


class Worker(Replication):
    """Worker of `count` servers, reached on `wire`. Base class of the two protocols.

    `first` is the rank of server 0 on the wire. `shard_class` makes the range of a worker that
    serves as well; None where servers are ranks of their own.
    """

    memory: WorkerMemory

    def __init__(
        self,
        mesh: Mesh,
        layout: Layout,
        memory: WorkerMemory,
        wire: Communicator,
        first: int,
        count: int,
        shard_class: Callable[..., Shard] | None = None,
    ) -> None:
        super().__init__(mesh, layout, memory)
        self.wire, self.first, self.count, self.shard_class = wire, first, count, shard_class
        self.num_workers = mesh.size("dp")
        self.versions = [-1] * count
        """Version of the weights here, by server; -1 before the first pull."""
        self.server: Server | None = None

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Find the key ranges of the servers."""
        super().attach(buffers)
        self._ranges = {stage: ranges(b, self.count) for stage, b in buffers.items()}
        self._counted = counted_grads(buffers, self.layout, {**self.mesh.coords, "dp": 0})
        self._sends: list[Work] = []

    def optimizer(self, make: MakeOptimizer) -> RemoteOptimizer:
        """Return the servers' optimizer. Make it here, if this worker serves a range."""
        if self.shard_class is not None:
            mine = {
                stage: key_range(
                    b.parameters, self.mesh.shape, b.dtype, self.mesh.coord("dp"), self.count
                )
                for stage, b in self.buffers.items()
            }
            for stage, held in mine.items():
                held.values[...] = self.buffers[stage].values[held.parts[0]]
            shard = self.shard_class(
                mine, make(list(mine.values())), self.num_workers, self.layout, self.mesh.coords
            )
            self.server = Server(self.wire, [shard], lambda rank: (rank, 0), self.wire.rank)
        self.remote = RemoteOptimizer(self, list(make([]).state()))
        return self.remote

    def state_bytes(self, optimizer: Optimizer) -> int:
        """Return the bytes of the range that this worker serves."""
        return 0 if self.server is None else self.server.shards[0].num_bytes

    def begin_step(self) -> None:
        """Discard last step's gradients, once they have been sent, and borrowed state."""
        self.remote.lent.clear()
        for work in self._sends:
            self.wait(work)
        self._sends.clear()
        super().begin_step()

    def reduce(self, stage: int) -> None:
        """Sum the partial gradients of the stage within the replica."""
        super().reduce(stage)
        started, buffers = time.perf_counter(), self.buffers[stage]
        for run in buffers.layout.runs:
            for axis in run.sum_axes:
                if axis not in TOKEN_AXES:
                    self.mesh.axis(axis).all_reduce_(buffers.grads[run.start : run.stop])
        self.exposed_seconds += time.perf_counter() - started

    # ---- requests

    def post(self, server: int, request: Request, arrays: Sequence[Array] = ()) -> None:
        """Send a request and what follows it to a server. The arrays must stay as they are."""
        if self.server is not None and server == self.mesh.coord("dp"):
            self.server.handed.extend(arrays)
            self.server.handle(self.wire.rank, request)
            return
        header, dest = request.pack(), self.first + server
        self._sends.append(self.wire.isend(header, dest, HEADER, kind="control"))
        kind = "payload" if request.op == Op.PUSH else "control"
        self._sends += [self.wire.isend(array, dest, DATA, kind) for array in arrays]

    def ask(
        self, server: int, request: Request, outs: Sequence[Array], arrays: Sequence[Array] = ()
    ) -> list[Work]:
        """Send a request whose answer fills `outs`, the first of them as control."""
        if self.server is not None and server == self.mesh.coord("dp"):
            self.server.wanted.append(outs)
            self.post(server, request, arrays)
            return [_Answered(self.server, outs)]
        source = self.first + server
        works = [
            self.wire.irecv(out, source, REPLY, "payload" if number else "control")
            for number, out in enumerate(outs)
        ]
        self.post(server, request, arrays)
        return works

    def wait(self, work: Work) -> None:
        """Block until `work` is done; a worker that serves answers meanwhile."""
        if self.server is None:
            work.wait()
            return
        pause, deadline = 50e-6, time.monotonic() + self.wire.timeout
        while not work.test():
            if self.server.poll():
                pause, deadline = 50e-6, time.monotonic() + self.wire.timeout
            elif time.monotonic() > deadline:
                raise CommTimeout(
                    f"waited {self.wire.timeout:g} s (--comm-timeout) for another worker"
                )
            else:
                time.sleep(pause)
                pause = min(1e-3, 1.5 * pause)

    def pull(self, clock: int, numbers: Sequence[float] = ()) -> np.ndarray:
        """Overwrite the weights by those of the servers; return their headers [S, REPLY_FIELDS]."""
        started = time.perf_counter()
        headers, works = np.empty((self.count, REPLY_FIELDS)), []
        for server in range(self.count):
            parts = [
                self.buffers[stage].values[found[server]] for stage, found in self._ranges.items()
            ]
            request = Request(Op.PULL, clock, numbers=tuple(numbers))
            works += self.ask(server, request, [headers[server], *parts])
        for work in works:
            self.wait(work)
        self.versions = [int(version) for version in headers[:, 0]]
        self.exposed_seconds += time.perf_counter() - started
        return headers

    def push(self, request: Request) -> None:
        """Send the gradients to the servers, each its range."""
        for server in range(self.count):
            parts = [
                self.buffers[stage].grads[found[server]] for stage, found in self._ranges.items()
            ]
            self.post(server, request._replace(version=self.versions[server]), parts)

    def exchange(self, op: Op, stage: int, kind: int, array: Array) -> None:
        """Read or write this worker's share of an array of the servers.

        `stage` and `kind` are indices, `array` is the share [n].
        """
        buffers = list(self.buffers.values())[stage]
        mine = buffers.parts[0]
        for server, held in enumerate(self._ranges[list(self.buffers)[stage]]):
            part = overlap(mine, held)
            if part.start < part.stop:
                numbers = (stage, kind, part.start, part.stop)
                request = Request(op, numbers=numbers)
                block = array[part.start - mine.start : part.stop - mine.start]
                if op == Op.GET:
                    works = self.ask(server, request, [block])
                else:
                    works = self.ask(server, request, [np.empty(0, array.dtype)], [block])
                for work in works:
                    self.wait(work)

    def adopt(self) -> None:
        """Give the weights of the model to the servers. Collective."""
        for stage, buffers in enumerate(self.buffers.values()):
            self.exchange(Op.SET, stage, 0, buffers.values[buffers.parts[0]])
        self.gather()

    def loaded(self) -> None:
        """Give loaded optimizer state to the servers. Collective."""
        self.remote.exchange(Op.SET)
        self.remote.lent.clear()
        self.gather()

    def gather(self) -> None:
        """Return once all ranks have come here. Collective."""
        self.wait(self.mesh.world.iall_reduce_(np.zeros(1), kind="control"))


class _Answered:
    """Work of an answer by the server in this process."""

    def __init__(self, server: Server, outs: Sequence[Array]) -> None:
        self._server, self._outs = server, outs

    def test(self) -> bool:
        """Return True once the server has filled the arrays."""
        return not any(outs is self._outs for outs in self._server.wanted)

    def wait(self) -> None:
        """Raise: only requests of others can change the state of the server."""
        raise RuntimeError("an answer of the own server is waited for by serving")


class SyncWorker(Worker):
    """Worker whose gradient enters the sum of a clock. Equals an all-reduce."""

    _pushed = 0

    def sum_of_squares(self) -> Any:
        """Push the gradients; return the squared norm of the sum on the first worker, else 0."""
        started = time.perf_counter()
        self.push(Request(Op.PUSH, self._pushed))
        self._pushed += 1
        if self.mesh.coord("dp"):
            return 0.0
        found = [np.zeros(1) for _ in range(self.count)]
        for server, out in enumerate(found):
            for work in self.ask(server, Request(Op.NORM), [out]):
                self.wait(work)
        self.exposed_seconds += time.perf_counter() - started
        return sum(float(out[0]) for out in found)

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        """Let the servers update, and pull the weights."""
        if self.mesh.coord("dp") == 0:
            for server in range(self.count):
                self.post(server, Request(Op.STEP, step, lr=lr, scale=float(scale)))
        self.pull(step + 1)


class FreeWorker(Worker):
    """Worker that pushes and pulls without waiting for the others, or for those far behind."""

    lockstep = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._version = np.full(self.num_workers, -1, np.int64)
        self._clock = 0
        self.staleness = math.nan

    @property
    def agreeing(self) -> Communicator:
        """The ranks of this worker: no worker waits for the others."""
        return self.mesh.axis("pp", "tp")

    def observer(self, stage: int, last: bool) -> BackwardObserver | None:
        """Return this worker, if it serves during its backward pass."""
        return None if self.server is None else self

    def leaf_ready(self, leaf: Any) -> None:
        """Do nothing: gradients are pushed after the last backward pass."""

    def between_nodes(self) -> None:
        """Answer requests of other workers."""
        self.progress()

    def record(self, run: Path, tracer: Tracer | None) -> None:
        """Keep a log and spans of the server in this process, if there is one."""
        if self.server is not None:
            self.server.record(run, self.mesh.coord("dp"), tracer)

    def progress(self) -> None:
        """Answer requests of other workers."""
        while self.server is not None and self.server.poll():
            pass

    def sum_of_squares(self) -> Any:
        """Return the squared norm of the gradient of this worker's mean loss."""
        return self.num_workers**2 * sum(map(kernels.sum_of_squares, self._counted))

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        """Push the gradient: the servers update by it."""
        self._clock = step + 1
        scale = float(scale) * self.num_workers
        self.push(Request(Op.PUSH, step, lr=lr, scale=scale))

    def conclude(self, numbers: Sequence[float]) -> list[float]:
        """Pull the weights of the next clock. Returns the numbers of the clock's first pull."""
        read = np.array(self.versions)
        headers = self.pull(self._clock, numbers)
        ages = headers[:, 1] - read
        self.staleness = float(ages[read >= 0].mean()) if (read >= 0).all() else math.nan
        return list(headers[0, 2:])

    def metrics(self) -> dict[str, float]:
        """Return the updates between this worker's last read and its push, a mean over servers."""
        return {} if math.isnan(self.staleness) else {"staleness": self.staleness}

    def meet(self) -> None:
        """Wait for all workers, and pull the weights that all of them have made. Collective."""
        self.gather()
        self.pull(self._clock, (0, 0, 0))
        self.gather()  # a worker that serves must not go on to an operation that blocks
        self._version[:] = self.versions[0]

    def state(self) -> Iterator[StateTensor]:
        """Yield the number of updates, which at a meeting all servers agree on.

        It has an entry for each worker, so another number of workers takes no count over.
        """
        spec = ShardSpec.replicated(self.num_workers)
        owned = self.mesh.coord("pp") == 0
        yield StateTensor("server/version", spec, self._version, owned=owned, fallback=NO_VERSION)

    def loaded(self) -> None:
        """Give loaded optimizer state and the number of updates to the servers. Collective."""
        for server in range(self.count if self._version[0] >= 0 else 0):
            request = Request(Op.COUNT, version=int(self._version[0]))
            for work in self.ask(server, request, [np.empty(0)]):
                self.wait(work)
        super().loaded()


def leave(wire: Communicator, mesh: MeshShape) -> None:
    """Tell the dedicated servers on `wire` that this worker needs them no more."""
    for server in range(mesh.num_ranks, wire.size):
        wire.send(Request(Op.LEAVE).pack(), server, HEADER, kind="control")
