"""Ledger of communication: per mesh axis, operation and kind the calls, bytes and seconds.

Every `Communicator` writes here before and after each operation, so the tests can hold each
parallel method to its closed formula. *Payload* bytes are what a rank asked to move, whatever the
library makes of it:

| operation | bytes counted on each rank |
|---|---|
| `all_reduce`, `reduce_scatter`, `all_to_all`, `send` | the local input |
| `all_gather`, `receive` | the local output |
| `broadcast` | the broadcast array, on every rank (input on the root, output elsewhere) |
| `broadcast_json`, `gather_json` | the encoded text (always kind `control`) |
| `barrier` | 0 (always kind `control`) |

`sendrecv` writes one row as `send` and one as `receive`. Groups of size 1 move nothing and write
nothing.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from minillm.base.errors import CommError

KINDS = ("payload", "control", "transport", "window")
NUM_RECENT = 256  # operations kept for time-out messages and the flight recorder
# Files of this folder: an operation is placed at the code that calls into it.
_INSIDE = frozenset(map(str, Path(__file__).parent.glob("*.py")))

RowKey = tuple[str, str, str]  # (axis, operation, kind)
EventHook = Callable[[str, str, float, float, int], None]


@dataclass(slots=True)
class Row:
    """Sums over the calls of one operation on one axis."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0  # s this rank was blocked
    wire: float = 0.0  # bytes this rank sends if the operation runs as a ring: `wire_bytes`

    def add(self, operation: str, num_bytes: int, seconds: float, group_size: int) -> None:
        """Add one call."""
        self.calls += 1
        self.bytes += num_bytes
        self.seconds += seconds
        self.wire += wire_bytes(operation, num_bytes, group_size)


def wire_bytes(operation: str, num_bytes: int, group_size: int) -> float:
    """Return the bytes that this rank sends if the operation runs as a ring of `group_size` ranks.

    `num_bytes` is the payload. An all-reduce is a reduce-scatter followed by an all-gather, each
    moving (n-1)/n of the array (Patarasuk and Yuan 2009). A receive is counted at its sender.
    """
    if operation == "send":
        return float(num_bytes)
    if operation in ("receive", "barrier") or group_size <= 1:
        return 0.0
    share = num_bytes * (group_size - 1) / group_size
    return 2 * share if operation == "all_reduce" else share


class Ledger:
    """Record of one rank's communication.

    `on_event(name, axis, start, end, num_bytes)` is called after each operation, with times of
    `time.perf_counter`. Event names are those of the rows. A non-blocking operation appears as
    `iall_reduce`, `isend` or `ireceive` (launch to completion) and, where the rank had to wait for
    it, as `wait`.

    With `check_order` every collective first compares its signature with those of all other ranks
    of its group, and raises CommError if they differ. This is slow, and it finds the collective
    that would deadlock.
    """

    def __init__(self, *, check_order: bool = False, on_event: EventHook | None = None) -> None:
        self.rows: dict[RowKey, Row] = {}
        self.operations: deque[Operation] = deque(maxlen=NUM_RECENT)
        self.check_order = check_order
        self.on_event = on_event
        self.step = 0
        """Step of the run, from 1, in which operations are noted; 0 before the first."""
        self.dump: Callable[[str], object] = lambda reason: None
        """Writes the operations for a reason, from any thread (recorder.py)."""

    def row(self, axis: str, operation: str, kind: str) -> Row:
        """Return the row of that key, made if absent. Raises CommError for an unknown kind."""
        key = (axis, operation, kind)
        row = self.rows.get(key)
        if row is None:
            if kind not in KINDS:
                raise CommError(
                    f"kind {kind!r} of {operation} on {axis!r} is unknown; choose one of "
                    f"{', '.join(KINDS)}"
                )
            row = self.rows[key] = Row()
        return row

    def record(
        self,
        axis: str,
        operation: str,
        kind: str,
        num_bytes: int,
        seconds: float = 0.0,
        group_size: int = 1,
    ) -> None:
        """Add one call that no communicator makes: kind `window`, bytes of shared memory."""
        self.row(axis, operation, kind).add(operation, num_bytes, seconds, group_size)

    def payload(self) -> dict[tuple[str, str], int]:
        """Return the payload bytes by (axis, operation), which the closed formulas predict."""
        return {
            (axis, operation): row.bytes
            for (axis, operation, kind), row in self.rows.items()
            if kind == "payload"
        }

    def snapshot(self) -> dict[RowKey, Row]:
        """Return a copy of the rows, to take differences with `since`."""
        return {
            key: Row(row.calls, row.bytes, row.seconds, row.wire) for key, row in self.rows.items()
        }

    def since(self, before: dict[RowKey, Row]) -> dict[RowKey, Row]:
        """Return what was added after `before = ledger.snapshot()`.

        Rows without new calls or seconds are left out.
        """
        none = Row()
        changes = {}
        for key, row in self.rows.items():
            old = before.get(key, none)
            if row.calls != old.calls or row.seconds != old.seconds:
                changes[key] = Row(
                    row.calls - old.calls,
                    row.bytes - old.bytes,
                    row.seconds - old.seconds,
                    row.wire - old.wire,
                )
        return changes

    def recent(self, count: int = 8) -> str:
        """Return the last operations, one a line, oldest first, for a time-out message."""
        lines = [f"  {operation}" for operation in list(self.operations)[-count:]]
        return "last operations of this rank:\n" + ("\n".join(lines) if lines else "  (none)")


class Operation:
    """Ledger entry of one call, and the context manager around a blocking one.

    `signature` describes the call, first the operation. Its parts are joined only when a message
    needs them, and the line of the caller is looked up only then. `ended` is None while the call
    has not returned.
    """

    __slots__ = (
        "axis", "code", "ended", "group_size", "instruction", "ledger", "name", "num_bytes", "row",
        "signature", "started", "step",
    )  # fmt: skip

    def __init__(
        self,
        ledger: Ledger,
        axis: str,
        group_size: int,
        name: str,
        kind: str,
        num_bytes: int,
        signature: tuple[Any, ...],
    ) -> None:
        self.ledger, self.axis, self.group_size = ledger, axis, group_size
        self.name, self.num_bytes, self.signature = name, num_bytes, signature
        self.row = ledger.row(axis, name, kind)
        self.step = ledger.step
        # Not the frame, which would keep the arrays of its variables alive.
        frame = sys._getframe(2)  # below it: this constructor and the method that calls it
        while frame.f_code.co_filename in _INSIDE and frame.f_back is not None:
            frame = frame.f_back
        self.code, self.instruction = frame.f_code, frame.f_lasti
        self.started = time.perf_counter()
        self.ended: float | None = None
        ledger.operations.append(self)

    def __str__(self) -> str:
        state = (
            "not finished" if self.ended is None else f"{(self.ended - self.started) * 1e3:.2f} ms"
        )
        return f"{self.describe()}: {state}"

    def describe(self) -> str:
        """Return the call in words, without its time."""
        step = f"step {self.step}, " if self.step else ""
        return (
            f"{describe(self.signature)} on {self.axis!r}, {step}{self.num_bytes} bytes, "
            f"{self.place()}"
        )

    def place(self) -> str:
        """Return file and line of the call."""
        return place(self.code, self.instruction)

    def __enter__(self) -> Operation:
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if exc_type is None:
            self.ended = time.perf_counter()
            self.count(self.ended)
            self.event(self.name, self.started, self.ended)

    def count(self, now: float) -> None:
        """Add the call to its row, with the seconds from its start to `now`."""
        self.row.add(self.name, self.num_bytes, now - self.started, self.group_size)

    def event(self, name: str, start: float, end: float) -> None:
        """Report an event of this call to the ledger's hook."""
        if self.ledger.on_event is not None:
            self.ledger.on_event(name, self.axis, start, end, self.num_bytes)


def place(code: CodeType, instruction: int) -> str:
    """Return folder, file and line of an instruction, as in "parallel/tensor.py:30"."""
    line = next((line for start, end, line in code.co_lines() if start <= instruction < end), None)
    name = "/".join(Path(code.co_filename).parts[-2:])
    return f"{name}:{code.co_firstlineno if line is None else line}"


def describe(signature: tuple[Any, ...]) -> str:
    """Return the text of a signature."""
    return " ".join(map(str, signature))


current_ledger: ContextVar[Ledger] = ContextVar("current_ledger")


def ledger() -> Ledger:
    """Return the ledger of this context (one per rank), made on first use."""
    found = current_ledger.get(None)
    if found is None:
        found = Ledger()
        current_ledger.set(found)
    return found


@contextmanager
def recording(**options: Any) -> Iterator[Ledger]:
    """Use a fresh `Ledger(**options)` inside the block."""
    fresh = Ledger(**options)
    token = current_ledger.set(fresh)
    try:
        yield fresh
    finally:
        current_ledger.reset(token)
