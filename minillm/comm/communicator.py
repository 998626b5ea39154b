"""What a group of ranks can do together: the `Communicator`, `Work` and `SharedWindow` protocols.

Everything a parallel method needs of other ranks goes through a `Communicator`, so the same layer
runs on one rank, on threads of one process and on MPI. Arrays travel as raw buffers and metadata as
JSON; nothing is pickled. All ranks of a group call its collectives in the same order. A trailing
underscore mutates the argument, a leading `i` returns a `Work`, everything else returns new arrays
(on a group of size 1 possibly the input itself). `BaseCommunicator` documents each method.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from minillm.base.arrays import Array
from minillm.comm.ledger import OrderRecord

DEFAULT_TIMEOUT = 300.0  # seconds
MAX_TAG = 32_766  # MPI promises tags up to 32767; the last one is ours


class ReduceOp(enum.Enum):
    """How an all-reduce combines two values."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


SUM, MAX, MIN = ReduceOp.SUM, ReduceOp.MAX, ReduceOp.MIN


class Work(Protocol):
    """An operation under way. It keeps its buffers alive; they must not be read or written before
    it is done."""

    def test(self) -> bool:
        """Move the operation along and say whether it is done. Never blocks."""

    def wait(self) -> None:
        """Return once the operation is done. Calling it again does nothing. Raises CommTimeout,
        PeerFailed, Revoked."""


class SharedWindow(Protocol):
    """Memory that all ranks of a node address: `parts[r]` is the uint8 array that rank `r` asked
    for, 64-byte aligned."""

    parts: list[np.ndarray]

    def sync(self) -> None:
        """Barrier after which every rank sees what every other rank had written before it.
        Collective."""

    def free(self) -> None:
        """Give the memory back; the arrays must no longer be used. Collective."""


class Communicator(Protocol):
    """A group of `size` ranks, of which this one is `rank`; `name` is its axis in the ledger.

    `BaseCommunicator` says what each method does.
    """

    rank: int
    size: int
    name: str
    timeout: float

    @property
    def order(self) -> OrderRecord: ...

    def all_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Array: ...
    def reduce_numbers(self, numbers: Sequence[float], op: ReduceOp = SUM) -> list[float]: ...
    def iall_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Work: ...
    def all_gather(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array: ...
    def reduce_scatter(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array: ...
    def all_to_all(
        self,
        parts: Sequence[Array],
        out_sizes: Sequence[int | tuple[int, ...]] | None = None,
        kind: str = "payload",
    ) -> list[Array]: ...
    def broadcast_(self, x: Array, root: int = 0, kind: str = "payload") -> Array: ...
    def send(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> None: ...
    def isend(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> Work: ...
    def recv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Array: ...
    def irecv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Work: ...
    def recv_any(self, out: Array, tag: int = 0, kind: str = "payload") -> int: ...
    def sendrecv(
        self, x: Array, dest: int, out: Array, source: int, tag: int = 0, kind: str = "payload"
    ) -> Array: ...
    def barrier(self) -> None: ...
    def broadcast_json(self, obj: Any, root: int = 0) -> Any: ...
    def gather_json(self, obj: Any) -> list[Any]: ...
    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None: ...
    def split_by_node(self) -> Communicator: ...
    def dup(self, name: str) -> Communicator: ...
    def alloc_shared(self, nbytes: int) -> SharedWindow: ...
