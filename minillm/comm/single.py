"""The group of one rank: a serial run executes the same code as a parallel one."""

from __future__ import annotations

import numpy as np

from minillm.base.arrays import Array, aligned_empty
from minillm.base.errors import CommError
from minillm.comm.communicator import DEFAULT_TIMEOUT, Communicator
from minillm.comm.ledger import Ledger
from minillm.comm.work import DoneWork, SharedWindow, Work


class _SelfWindow:
    """Window of a one-rank group: ordinary memory; sync is a no-op."""

    def __init__(self, nbytes: int) -> None:
        self.parts = [aligned_empty((nbytes,), np.uint8)]
        self.parts[0][...] = 0

    def sync(self) -> None:
        """Return at once: one rank always sees its own writes."""

    def free(self) -> None:
        self.parts = []


class _SelfReceive:
    """Receive of a message that this rank sends to itself."""

    def __init__(self, comm: SelfCommunicator, out: np.ndarray, tag: int) -> None:
        self._comm, self._out, self._tag = comm, out, tag
        self._done = False

    def test(self) -> bool:
        """Receive the message if it has been sent."""
        if not self._done and self._comm._messages.get(self._tag):
            self.wait()
        return self._done

    def wait(self) -> None:
        """Receive the message. Raises CommError if it has not been sent: it never will be."""
        if not self._done:
            self._comm._recv_any(self._out, self._tag)
            self._done = True


class SelfCommunicator(Communicator):
    """The group of one rank. Collectives return their input; messages wait in a queue per tag."""

    def __init__(self, name: str = "self", timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(0, 1, name, timeout)
        self._messages: dict[int, list[np.ndarray]] = {}

    def _ledger(self) -> Ledger:
        return Ledger()  # read by no one: a group of one rank moves nothing

    def _isend(self, flat: Array, dest: int, tag: int) -> Work:
        self._messages.setdefault(tag, []).append(flat.copy())
        return DoneWork()

    def _irecv(self, flat: Array, source: int, tag: int) -> Work:
        return _SelfReceive(self, flat, tag)

    def _recv_any(self, flat: Array, tag: int) -> int:
        if not self._messages.get(tag):
            raise CommError(
                f"receive of tag {tag} on {self.name!r}, a group of one rank that has sent "
                "nothing, would never end; send first"
            )
        message = self._messages[tag].pop(0)
        if message.nbytes != flat.nbytes:
            raise CommError(
                f"message of {message.nbytes} bytes does not fit the receive of {flat.nbytes} "
                f"bytes (tag {tag} on {self.name!r})"
            )
        flat[...] = message
        return 0

    def _iprobe(self, tag: int) -> int | None:
        return 0 if self._messages.get(tag) else None

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

    def unanimous(self, ok: bool = True) -> bool:
        return ok

    def revoke(self) -> None:
        pass

    def shrink(self) -> Communicator:
        return SelfCommunicator(self.name, self.timeout)
