"""Chrome trace of a run: spans of computation and communication of each rank.

The file opens in Perfetto (ui.perfetto.dev) or chrome://tracing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.base.errors import MinillmError
from minillm.base.whole_file import write_text

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator

MOST_EVENTS = 200_000  # of a rank, 0.1 GB: 6,000 steps of 12 layers without a pipeline
TRACKS = {
    "compute": 0,
    "communication": 1,
    "prefetch": 10,
    "reduction": 30,
    "messages": 50,
    "server": 70,
}
"""Track -> thread number. Prefetch, reduction and messages hold operations in the background, from
launch to completion; those that overlap lie on further threads of the same name."""
BACKGROUND = {
    "iall_gather": "prefetch",
    "iall_reduce": "reduction",
    "ireduce_scatter": "reduction",
    "isend": "messages",
    "ireceive": "messages",
}
MOST_LANES = 20  # threads of a track


class Tracer:
    """Recorder of one rank's spans, by tracks.

    Times of `time.perf_counter` are converted to the machine's clock, so the ranks of a node share
    one time axis. The first `MOST_EVENTS` spans are kept; `dropped` counts the others.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._epoch = time.time() - time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._part: tuple[str, float] | None = None  # title and start, within a span
        self._ends: dict[str, list[float]] = {}  # background track -> ends of its threads
        self.dropped = 0

    @contextmanager
    def span(self, name: str, track: str) -> Iterator[None]:
        """Record the enclosed block, and the parts that it announces. Spans do not nest."""
        start = time.perf_counter()
        self._part = ("", start)
        try:
            yield
        finally:
            end = self._end_part("")
            self._part = None
            self.add(name, track, start, end)

    def part(self, name: str, before: str = "") -> None:
        """Begin a part of the enclosing span, and end the one before it. No-op outside of spans.

        `before` names what the span has done before its first part. It is not recorded if empty.
        """
        if self._part is not None:
            self._part = (name, self._end_part(before))

    def _end_part(self, otherwise: str) -> float:
        """Record the part that ends now, called `otherwise` if it has no name; return the time."""
        now = time.perf_counter()
        if self._part is not None and (name := self._part[0] or otherwise):
            self.add(name, "compute", self._part[1], now)
        return now

    def add(self, name: str, track: str, start: float, end: float, **args: Any) -> None:
        """Record a span from `start` to `end`, in seconds of `time.perf_counter`."""
        if len(self._events) >= MOST_EVENTS:
            self.dropped += 1
            return
        event = {
            "name": name,
            "ph": "X",
            "pid": self.rank,
            "tid": TRACKS[track] + self._lane(track, start, end),
            "ts": (self._epoch + start) * 1e6,
            "dur": (end - start) * 1e6,
        }
        self._events.append(event | ({"args": args} if args else {}))

    def _lane(self, track: str, start: float, end: float) -> int:
        """Return the first thread of a background track that is free at `start`, and take it."""
        if track not in BACKGROUND.values():
            return 0
        ends = self._ends.setdefault(track, [])
        free = (lane for lane, until in enumerate(ends) if until <= start)
        lane = min(next(free, len(ends)), MOST_LANES - 1)
        ends[lane : lane + 1] = [end]
        return lane

    def communication(self, name: str, axis: str, start: float, end: float, num_bytes: int) -> None:
        """Record an operation of the ledger. A callback for `Ledger.on_event`."""
        track = BACKGROUND.get(name, "communication")
        self.add(f"{name} {axis}", track, start, end, bytes=num_bytes)

    def write(self, path: Path, comm: Communicator) -> None:
        """Gather all ranks' spans and write one JSON file on rank 0, atomically. Collective.

        Raises MinillmError on rank 0 if the file cannot be written.
        """
        everyone = comm.gather_json(self._events)
        if comm.rank:
            return
        names = [
            {"name": kind, "ph": "M", "pid": rank, "tid": tid, "args": {"name": name}}
            for rank in range(comm.size)
            for kind, tid, name in (
                ("process_name", 0, f"rank {rank}"),
                *(
                    ("thread_name", tid, next(t for t in reversed(TRACKS) if TRACKS[t] <= tid))
                    for tid in sorted({0, 1, *(event["tid"] for event in everyone[rank])})
                ),
            )
        ]
        origin = min((event["ts"] for events in everyone for event in events), default=0.0)
        events = [event | {"ts": event["ts"] - origin} for events in everyone for event in events]
        text = json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"})
        try:
            write_text(path, text)
        except OSError as error:
            raise MinillmError(f"{path} cannot be written: {error.strerror}") from None
