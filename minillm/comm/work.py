"""Non-blocking operations, and memory that ranks share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from minillm.comm.ledger import Operation


class Work(Protocol):
    """Non-blocking operation.

    It keeps its buffers alive. They must not be read or written before it is done.
    """

    def test(self) -> bool:
        """Make progress and return True once the operation is done. Never blocks."""

    def wait(self) -> None:
        """Block until the operation is done. A second call is a no-op.

        Raises CommTimeout or PeerFailed.
        """


class DoneWork:
    """Work of an operation that finished at once."""

    def test(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once."""


class AllWork:
    """Several operations as one, finished in their order."""

    def __init__(self, works: Iterable[Work]) -> None:
        self._works = deque(works)

    def test(self) -> bool:
        """Make progress and return True once all operations are done."""
        while self._works and self._works[0].test():
            self._works.popleft()
        return not self._works

    def wait(self) -> None:
        """Block until all operations are done."""
        while self._works:
            self._works[0].wait()
            self._works.popleft()


class ThenWork:
    """Work that calls `then` once the inner Work is done, and keeps `keep` alive until then."""

    def __init__(self, inner: Work, keep: object, then: Callable[[], None] | None = None) -> None:
        self._inner: Work | None = inner
        self._keep, self._then = keep, then

    def _finish(self) -> None:
        self._inner = None
        if self._then is not None:
            self._then()
        self._keep = self._then = None

    def test(self) -> bool:
        """Make progress and return True once `then` has run."""
        if self._inner is not None and self._inner.test():
            self._finish()
        return self._inner is None

    def wait(self) -> None:
        """Block until the inner Work is done; then run `then`."""
        if self._inner is not None:
            self._inner.wait()
            self._finish()


class TrackedWork:
    """Work that adds its blocked time and its completion to the ledger entry of its launch."""

    __slots__ = ("_event", "_inner", "_operation")

    def __init__(self, inner: Work, operation: Operation, event: str) -> None:
        self._inner: Work | None = inner
        self._operation, self._event = operation, event
        operation.count(time.perf_counter())

    def test(self) -> bool:
        """Make progress and return True once the operation is done."""
        if self._inner is None:
            return True
        start = time.perf_counter()
        done = self._inner.test()
        end = time.perf_counter()
        self._operation.row.seconds += end - start
        if done:
            self._finish(end)
        return done

    def wait(self) -> None:
        """Block until the operation is done."""
        if self._inner is None:
            return
        start = time.perf_counter()
        self._inner.wait()
        end = time.perf_counter()
        self._operation.row.seconds += end - start
        self._operation.event("wait", start, end)
        self._finish(end)

    def _finish(self, end: float) -> None:
        self._inner = None
        self._operation.ended = end
        self._operation.event(self._event, self._operation.started, end)


class SharedWindow(Protocol):
    """Memory that all ranks of a node address.

    `parts[r]` is the uint8 array that rank `r` asked for, 64-byte aligned.
    """

    parts: list[np.ndarray]

    def sync(self) -> None:
        """Wait for all ranks; afterwards each sees all earlier writes of the others. Collective."""

    def free(self) -> None:
        """Release the memory; the arrays must no longer be used. Collective."""
