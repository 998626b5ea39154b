"""Key ranges of a parameter server, and the rules by which gradients update them.

Server s of S holds key range s: a contiguous share of the flat buffer of every pp and tp coordinate
(Li et al. 2014, OSDI).

`SyncShard` adds the gradients of a clock in the order of the workers and updates once. `FreeShard`
updates at every push. It answers a pull at clock c when every worker has pushed c - s updates or
has left (stale synchronous, Ho et al. 2013; s infinite: asynchronous, Dean et al. 2012).

Invariant: a worker's push of a clock counts once. The clock is its sequence number, and a repeated
one is dropped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minillm import kernels
from minillm.autograd.slot import GradSlot
from minillm.base.arrays import Array
from minillm.base.errors import CommError
from minillm.layout.flat import Span
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.placement import Layout
from minillm.layout.sharding import overlap, share
from minillm.params.parameter import Parameter, ParamStorage, PlainStorage
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.replication.all_reduce import counted_parts
from minillm.replication.protocol import Optimizer
from minillm.replication.server_messages import Request


class Applied(NamedTuple):
    """Line of a server's log: `worker`'s gradient of `clock`, and two versions of the weights."""

    worker: int
    clock: int
    read: int  # version that the gradient was computed with
    applied: int  # version that the update changed into the next one


class KeyRange(PrivateMemory):
    """Memory of server `rank` of `size`: its share of values, gradients and optimizer state."""

    shards: frozenset[str] = frozenset({"values", "grads", "state"})
    axes: tuple[str, ...] = ("dp",)

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def storage(self, buffers: FlatBuffers, span: Span[Parameter]) -> ParamStorage:
        """Return storage without elements: a server computes with no parameter."""
        none = buffers.grads[:0]
        return PlainStorage(none, GradSlot(none))


def key_range(
    parameters: Sequence[Parameter], mesh: MeshShape, dtype: np.dtype, rank: int, size: int
) -> FlatBuffers:
    """Return the buffers in which server `rank` of `size` holds its part of a stage.

    Frozen parameters stay with the workers. The storage of `parameters` stays as it is.
    """
    copies = [copy.copy(parameter) for parameter in parameters if parameter.trains]
    return FlatBuffers(copies, mesh, dtype, memory=KeyRange(rank, size))


def ranges(buffers: FlatBuffers, size: int) -> list[slice]:
    """Return the key range of each of `size` servers in the whole buffer of a worker's stage."""
    layout = buffers.layout
    return [share(layout.size, rank, size, layout.step) for rank in range(size)]


class Shard:
    """Key range of the stages at one pp and tp coordinate, and the state of its workers.

    `buffers` are those of `key_range`, stage by stage. Base class of the rules of update.
    """

    together = False
    """True if the shards of a server have one version: a push of a worker counts once all of its
    ranks have pushed, and a pull is answered once all of them ask."""

    def __init__(
        self,
        buffers: Mapping[int, FlatBuffers],
        optimizer: Optimizer,
        num_workers: int,
        layout: Layout,
        coords: Mapping[str, int],
    ) -> None:
        self.buffers, self.optimizer = list(buffers.values()), optimizer
        self.version = -1
        """Updates so far; -1 before it is known."""
        self.first = -1
        """Version of the weights with which all workers begin."""
        self.clocks: list[float] = [-1] * num_workers
        self.waiting: dict[int, Request] = {}  # worker -> pull that is not answered yet
        self.log: list[Applied] = []
        self._counted = [
            b.at(b.grads, "grads", part)
            for stage, b in buffers.items()
            for counted, counts in counted_parts(b.layout, layout, stage, {**coords, "dp": 0})
            for part in [overlap(counted, b.parts[0])]
            if counts and part.start < part.stop
        ]

    def arrays(self, stage: int) -> list[Array]:
        """Return values and optimizer state of the stage with this index, by index."""
        states = self.optimizer.state().values()
        return [self.buffers[stage].values, *(state[stage].array for state in states)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays of the shard."""
        arrays = [array for stage in range(len(self.buffers)) for array in self.arrays(stage)]
        return sum(array.nbytes for array in [*arrays, *(b.grads for b in self.buffers)])

    def squares(self) -> float:
        """Return this range's part of the squared norm of the gradient that it holds."""
        return float(sum(map(kernels.sum_of_squares, self._counted)))

    def start(self, clock: int) -> None:
        """Begin at `clock`, if this is the first push. All workers begin at the same one."""
        if min(self.clocks) < 0:
            self.clocks = [clock if known < 0 else known for known in self.clocks]
            self.first = self.version = clock if self.version < 0 else self.version

    def ready(self, clock: int) -> bool:
        """Return whether a pull at `clock` may be answered."""
        raise TypeError(f"{type(self).__name__} does not define ready")

    def waits(self, worker: int) -> bool:
        """Return whether a pull of the worker waits that may be answered."""
        request = self.waiting.get(worker)
        return request is not None and self.ready(int(request.clock))

    def push(self, worker: int, request: Request, receive: Callable[[Array], object]) -> None:
        """Take a gradient; `receive` fills an array with the next of its parts."""
        raise TypeError(f"{type(self).__name__} does not define push")

    def reply(self, worker: int, request: Request) -> np.ndarray:
        """Return the header of the answer to a pull [REPLY_FIELDS]."""
        return np.array([self.version, self.version - 1, 0, 0, 0], np.float64)

    def apply(self, worker: int, clock: int, read: int, lr: float, scale: float) -> None:
        """Update from the gradient that lies in the buffers."""
        self.optimizer.step(self.version, lr, scale)
        self.log.append(Applied(worker, clock, read, self.version))
        self.version += 1

    def overwritten(self) -> None:
        """Note that a worker has set weights or state, as a run does that goes back."""

    def receive_grads(self, receive: Callable[[Array], object]) -> None:
        """Overwrite the gradients of all stages."""
        for buffers in self.buffers:
            receive(buffers.grads)


class SyncShard(Shard):
    """Updates once per clock, from the sum over the workers in their order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._come: dict[int, Callable[[Array], object]] = {}  # worker -> its gradient, to receive
        self._summed = 0
        self._parts = [np.empty_like(b.grads) for b in self.buffers if len(self.clocks) > 1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays of the shard."""
        return super().num_bytes + sum(part.nbytes for part in self._parts)

    @property
    def complete(self) -> bool:
        """True once the gradients of all workers are in the sum."""
        return self._summed == len(self.clocks)

    def push(self, worker: int, request: Request, receive: Callable[[Array], object]) -> None:
        """Add the gradients that have come, as far as their order allows."""
        if request.clock < self.clocks[worker] or worker in self._come:
            for buffers in self.buffers:
                receive(np.empty_like(buffers.grads))
            return
        self._come[worker] = receive
        while (take := self._come.pop(self._summed, None)) is not None:
            if self._summed == 0:
                self.receive_grads(take)
            else:
                for buffers, part in zip(self.buffers, self._parts, strict=True):
                    take(part)
                    buffers.grads += part
            self.clocks[self._summed] = request.clock + 1
            self._summed += 1

    def ready(self, clock: int) -> bool:
        """Return whether the update of the clock before has been made."""
        return self.version >= clock

    def overwritten(self) -> None:
        """Wait for the next update before a pull is answered, whatever its clock."""
        self.version = -1

    def step(self, request: Request) -> None:
        """Update from the sum."""
        self._summed = 0
        self.optimizer.step(int(request.clock), request.lr, request.scale)
        self.version = int(request.clock) + 1


class FreeShard(Shard):
    """Updates at every push. A worker may be `staleness` clocks ahead of the slowest."""

    together = True

    def __init__(self, *args: Any, staleness: float = math.inf) -> None:
        super().__init__(*args)
        self.staleness = staleness
        self._applied = [-1] * len(self.clocks)  # version that each worker's last push changed
        self._told = [0.0, 0.0, 0.0]  # largest numbers of all pulls so far
        self._agreed: dict[int, tuple[float, ...]] = {}  # clock -> numbers of its first pull

    def push(self, worker: int, request: Request, receive: Callable[[Array], object]) -> None:
        """Update, unless this is a repetition."""
        clock, read = int(request.clock), int(request.version)
        self.start(clock)
        self.receive_grads(receive)
        if clock < self.clocks[worker]:
            return
        if clock > self.clocks[worker]:
            raise CommError(
                f"worker {worker} pushed clock {clock}, but the server has seen "
                f"{self.clocks[worker]:g} of its pushes"
            )
        self._applied[worker] = self.version
        self.apply(worker, clock, self.first if read < 0 else read, request.lr, request.scale)
        self.clocks[worker] = clock + 1

    def ready(self, clock: int) -> bool:
        """Return whether no worker is more than `staleness` clocks behind `clock`."""
        return min(self.clocks) >= clock - self.staleness

    def reply(self, worker: int, request: Request) -> np.ndarray:
        """Return the header of an answer.

        The first pull of a clock decides its numbers, so all workers get the same: the largest
        that any worker has sent so far.
        """
        clock = int(request.clock)
        self._told = [max(a, b) for a, b in zip(self._told, request.numbers, strict=False)]
        agreed = self._agreed.setdefault(clock, tuple(self._told))
        for old in [known for known in self._agreed if known < min(self.clocks)]:
            del self._agreed[old]
        return np.array([self.version, self._applied[worker], *agreed], np.float64)
