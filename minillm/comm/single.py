"""The group of size 1: what makes a serial run the same code as a parallel one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from minillm.base.arrays import Array, aligned_empty
from minillm.base.errors import CommError
from minillm.comm.base import BaseCommunicator
from minillm.comm.communicator import (
    DEFAULT_TIMEOUT,
    SUM,
    Communicator,
    ReduceOp,
    SharedWindow,
    Work,
)
from minillm.comm.work import DoneWork


class _SelfWindow:
    """Private memory is shared enough among one rank."""

    def __init__(self, nbytes: int) -> None:
        self.parts = [aligned_empty((nbytes,), np.uint8)]
        self.parts[0][...] = 0

    def sync(self) -> None:
        """One rank always sees its own writes."""

    def free(self) -> None:
        self.parts = []


class SelfCommunicator(BaseCommunicator):
    """The group of one rank: collectives return their input, nothing is copied and nothing is
    written into the ledger.

    A message to oneself is kept until it is received; a receive without one is an error, since it
    would wait for ever.
    """

    def __init__(self, name: str = "self", timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(0, 1, name, timeout)
        self._messages: dict[int, list[np.ndarray]] = {}

    def all_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Array:
        self._check_reducible(x, op)
        return x

    def reduce_numbers(self, numbers: Sequence[float], op: ReduceOp = SUM) -> list[float]:
        return list(numbers)

    def iall_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Work:
        self._check_reducible(x, op)
        return DoneWork()

    def all_gather(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array:
        self._check_whole("all_gather", x, dim, sizes)
        return x

    def reduce_scatter(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array:
        self._check_reducible(x, SUM)
        self._check_whole("reduce_scatter", x, dim, sizes)
        return x

    def all_to_all(
        self,
        parts: Sequence[Array],
        out_sizes: Sequence[int | tuple[int, ...]] | None = None,
        kind: str = "payload",
    ) -> list[Array]:
        if len(parts) != 1:
            raise CommError(f"all_to_all on {self.name!r} got {len(parts)} parts for 1 rank")
        return list(parts)

    def broadcast_(self, x: Array, root: int = 0, kind: str = "payload") -> Array:
        self._check_rank(root, "root")
        return x

    def send(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> None:
        self._check_rank(dest, "dest", tag)
        self._messages.setdefault(tag, []).append(x.copy())

    def isend(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> Work:
        self.send(x, dest, tag)
        return DoneWork()

    def recv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Array:
        self._check_rank(source, "source", tag)
        waiting = self._messages.get(tag)
        if not waiting:
            raise CommError(
                f"receive of tag {tag} on {self.name!r}, a group of one rank that has sent "
                "nothing, would wait for ever"
            )
        message = waiting.pop(0)
        if message.nbytes != out.nbytes:
            raise CommError(
                f"message of {message.nbytes} bytes does not fit the receive of {out.nbytes} bytes "
                f"(tag {tag} on {self.name!r})"
            )
        out[...] = message.reshape(out.shape)
        return out

    def irecv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Work:
        self.recv(out, source, tag)
        return DoneWork()

    def recv_any(self, out: Array, tag: int = 0, kind: str = "payload") -> int:
        self.recv(out, 0, tag)
        return 0

    def sendrecv(
        self, x: Array, dest: int, out: Array, source: int, tag: int = 0, kind: str = "payload"
    ) -> Array:
        self.send(x, dest, tag)
        return self.recv(out, source, tag)

    def barrier(self) -> None:
        """Everyone is here."""

    def broadcast_json(self, obj: Any, root: int = 0) -> Any:
        self._check_rank(root, "root")
        return json.loads(json.dumps(obj))

    def gather_json(self, obj: Any) -> list[Any]:
        return [json.loads(json.dumps(obj))]

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        return None if color is None else SelfCommunicator(name or self.name, self.timeout)

    def split_by_node(self) -> Communicator:
        return SelfCommunicator("node", self.timeout)

    def dup(self, name: str) -> Communicator:
        return SelfCommunicator(name, self.timeout)

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        return _SelfWindow(nbytes)

    def _check_whole(self, operation: str, x: Array, dim: int, sizes: Sequence[int] | None) -> None:
        dim = self._check_dim(x, dim)
        if sizes is not None:
            self._check_sizes(operation, sizes, x.shape[dim], own=True)
