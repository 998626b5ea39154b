"""SIGINT and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from minillm.comm.process import abort


class StopRequest:
    """Record of SIGINT or SIGTERM, so that a run can finish its step, save and stop.

    A second signal ends all ranks at once. With `announces` the first one prints a line.
    """

    def __init__(self, announces: bool) -> None:
        self.signal: str | None = None
        self._announces = announces

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block."""
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            abort(128 + number)
            os._exit(128 + number)
        self.signal = signal.Signals(number).name
        if self._announces:
            # os.write bypasses Python's buffers, which the interrupted code may be writing to.
            os.write(
                2,
                f"\n{self.signal}: finishing this step, then saving and stopping; once more to "
                "abort\n".encode(),
            )
