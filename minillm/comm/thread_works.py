"""Works of thread ranks: operations launched, and finished when the other ranks have come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minillm.comm.boards import Message

if TYPE_CHECKING:
    from minillm.comm.thread_communicator import ThreadCommunicator


class Joined(NamedTuple):
    """Number of a meeting that this rank has joined, and the name of the collective."""

    number: int
    what: str


class MeetingWork:
    """Collective that this rank has joined and not yet finished."""

    def __init__(
        self, comm: ThreadCommunicator, joined: Joined, finish: Callable[[Any], None]
    ) -> None:
        self._comm, self._joined, self._finish = comm, joined, finish
        self._done = False

    def test(self) -> bool:
        """Finish the collective if all ranks have joined it."""
        if not self._done and self._comm._is_complete(self._joined):
            self.wait()
        return self._done

    def wait(self) -> None:
        """Block until all ranks have joined; then finish the collective."""
        if not self._done:
            self._finish(self._comm._take(self._joined))
            self._done = True


class SendWork:
    """Send: done when the receiver has come under rendezvous, otherwise at once."""

    def __init__(self, comm: ThreadCommunicator, message: Message, dest: int, what: str) -> None:
        self._comm, self._message, self._what = comm, message, what
        self._dest = dest

    def test(self) -> bool:
        """Return True once the send is done."""
        return self._message.received or not self._comm._world.rendezvous

    def wait(self) -> None:
        """Block until the send is done."""
        world = self._comm._world
        if world.rendezvous:
            with world.changed:
                world.wait_for(
                    lambda: self._message.received,
                    self._what,
                    self._comm.timeout,
                    lambda: self._comm._board.failure([self._dest]),
                )


class ReceiveWork:
    """Receive into `out`. Messages are matched with receives in the order of both launches."""

    def __init__(self, comm: ThreadCommunicator, out: np.ndarray, source: int, tag: int) -> None:
        self._comm, self._out, self._key = comm, out, (source, comm.rank, tag)
        self._done = False
        self._queue = comm._receives[self._key]  # of receives that are not done
        self._queue.append(self)

    def test(self) -> bool:
        """Receive the message if it has been sent."""
        while not self._done and self._comm._board.messages.get(self._key):
            self._queue[0]._take()
        return self._done

    def wait(self) -> None:
        """Block until the message has been received."""
        while not self._done:
            self._queue[0]._take()

    def _take(self) -> None:
        self._comm._receive(self._out, [self._key])
        self._done = True
        self._queue.popleft()
