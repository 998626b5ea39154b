"""Flight recorder: the last communications of a rank, written to the folder of its run.

The ledger keeps the operations in a ring at all times (`Ledger.operations`). A file of them is
written at SIGUSR2, and on every rank when a wait of any rank exceeds its time-out.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.base.whole_file import replace
from minillm.comm.ledger import Ledger, Operation, describe

FOLDER = "flight"  # in the folder of the run


class FlightRecorder:
    """Writer of one rank's ring to `run`/flight/rank-NNNNN.jsonl. Any thread may call it."""

    def __init__(self, book: Ledger, run: Path, rank: int) -> None:
        self.book, self.rank = book, rank
        self.path = run / FOLDER / f"rank-{rank:05d}.jsonl"

    def dump(self, reason: str) -> None:
        """Write the ring, and say so on standard error. A failure is a line there too."""
        temporary = self.path.with_suffix(".tmp")
        said = f"the last communications are in {self.path}"
        try:
            self.path.parent.mkdir(exist_ok=True)
            temporary.write_text("".join(self._lines(reason)), encoding="utf-8")
            replace(temporary, self.path)
        except OSError as error:
            said = f"the last communications cannot be written to {self.path}: {error.strerror}"
        with contextlib.suppress(OSError):
            # Past Python's buffers: this is a thread, and the main one may hold their lock.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, self._said(said, reason))

    def _said(self, text: str, reason: str) -> bytes:
        return f"rank {self.rank}: {reason}: {text}\n".encode()

    def _lines(self, reason: str) -> Iterator[str]:
        """Yield a line about this process, then one for each operation, oldest first."""
        now = time.perf_counter()
        head = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "reason": reason,
            "step": self.book.step,
        }
        yield json.dumps(head) + "\n"
        for operation in list(self.book.operations):
            yield json.dumps(row(operation, now)) + "\n"


def row(operation: Operation, now: float) -> dict[str, Any]:
    """Return an operation as JSON; `now` is the time of `time.perf_counter`.

    `seconds_ago` is its start, `seconds` its duration: None while it has not returned.
    """
    ended = operation.ended
    return {
        "operation": describe(operation.signature),
        "axis": operation.axis,
        "step": operation.step,
        "bytes": operation.num_bytes,
        "place": operation.place(),
        "seconds_ago": now - operation.started,
        "seconds": None if ended is None else ended - operation.started,
    }
