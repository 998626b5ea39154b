"""Operations under way: the one that is already done, several as one, and the one that keeps the
ledger."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from minillm.comm.communicator import Work
from minillm.comm.ledger import Recording, wire_bytes


class DoneWork:
    """The Work of an operation that was finished at once."""

    def test(self) -> bool:
        """True."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class AllWork:
    """Several operations as one, finished in their order."""

    def __init__(self, works: Iterable[Work]) -> None:
        self._works = deque(works)

    def test(self) -> bool:
        """See `Work`."""
        while self._works and self._works[0].test():
            self._works.popleft()
        return not self._works

    def wait(self) -> None:
        """See `Work`."""
        while self._works:
            self._works[0].wait()
            self._works.popleft()


class TrackedWork:
    """A Work that writes its blocked time and its completion into the ledger, and copies back into
    a non-contiguous array."""

    __slots__ = (
        "_copy_back",
        "_done",
        "_event",
        "_group",
        "_inner",
        "_ledger",
        "_operation",
        "_row",
    )

    def __init__(
        self, inner: Work, recording: Recording, event: str, copy_back: Callable[[], None] | None
    ) -> None:
        self._inner: Work | None = inner
        self._ledger, self._row, self._operation = (
            recording.ledger,
            recording.row,
            recording.operation,
        )
        self._event, self._copy_back = event, copy_back
        self._done = False
        num_bytes = recording.num_bytes
        self._row.calls += 1
        self._row.bytes += num_bytes
        self._row.wire += wire_bytes(recording.name, num_bytes, recording.group_size)
        self._row.seconds += time.perf_counter() - self._operation.started

    def test(self) -> bool:
        """See `Work`."""
        if self._inner is None:
            return True
        start = time.perf_counter()
        done = self._inner.test()
        end = time.perf_counter()
        self._row.seconds += end - start
        if done:
            self._finish(end)
        return done

    def wait(self) -> None:
        """See `Work`."""
        if self._inner is None:
            return
        start = time.perf_counter()
        self._inner.wait()
        end = time.perf_counter()
        self._row.seconds += end - start
        if self._ledger.on_event is not None:
            self._ledger.on_event(
                "wait", self._operation.axis, start, end, self._operation.num_bytes
            )
        self._finish(end)

    def _finish(self, end: float) -> None:
        self._inner = None
        if self._copy_back is not None:
            self._copy_back()
            self._copy_back = None
        self._operation.ended = end
        if self._ledger.on_event is not None:
            self._ledger.on_event(
                self._event,
                self._operation.axis,
                self._operation.started,
                end,
                self._operation.num_bytes,
            )
