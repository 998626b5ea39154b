"""What was sent: per mesh axis, operation and kind the calls, bytes and seconds; and the order of
operations, compared across ranks.

Every `Communicator` writes here before and after each operation, so the tests can hold each
parallel method to its closed formula.
*Payload* bytes are what a rank asked to move, whatever the library makes of it:

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

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from minillm.base.errors import CommError

KINDS = ("payload", "control", "transport", "window")
NUM_RECENT = 24  # operations kept for time-out messages and order comparisons

RowKey = tuple[str, str, str]  # (axis, operation, kind)
EventHook = Callable[[str, str, float, float, int], None]


@dataclass(slots=True)
class Row:
    """Sums over the calls of one operation on one axis. `seconds` is time blocked; `wire` is
    ring-equivalent bytes sent by this rank."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    wire: float = 0.0


@dataclass(slots=True)
class Operation:
    """One call, for time-out messages. `ended` is None while the call has not come back."""

    name: str
    axis: str
    detail: str
    num_bytes: int
    started: float
    ended: float | None = None

    def __str__(self) -> str:
        state = (
            "not finished" if self.ended is None else f"{(self.ended - self.started) * 1e3:.2f} ms"
        )
        return f"{self.name} on {self.axis!r}, {self.detail}{self.num_bytes} bytes: {state}"


def wire_bytes(operation: str, num_bytes: int, group_size: int) -> float:
    """Bytes this rank puts on the wire if the operation runs as a ring of `group_size` ranks, given
    its payload bytes.

    An all-reduce is a reduce-scatter followed by an all-gather, each moving (n-1)/n of the array
    (Patarasuk and Yuan 2009). A receive costs its sender.
    """
    if operation == "send":
        return float(num_bytes)
    if operation in ("receive", "barrier") or group_size <= 1:
        return 0.0
    share = num_bytes * (group_size - 1) / group_size
    return 2 * share if operation == "all_reduce" else share


class OrderRecord:
    """The sequence of collectives one communicator has run: a running checksum, their number, and
    the last few as text.

    Ranks that took part in the same collectives in the same order have equal records; sends and
    receives differ by rank and are left out.
    """

    __slots__ = ("checksum", "count", "recent")

    def __init__(self) -> None:
        self.checksum = 0
        self.count = 0
        self.recent: deque[tuple[int, str]] = deque(maxlen=NUM_RECENT)

    def add(self, signature: str) -> None:
        """Append one collective, described by what must agree between ranks: operation, shape,
        dtype."""
        self.checksum = zlib.crc32(signature.encode(), self.checksum)
        self.recent.append((self.count, signature))
        self.count += 1


class Ledger:
    """The record of one rank. `on_event(name, axis, start, end, num_bytes)` is called after each
    operation, with times of `time.perf_counter`.

    Event names are those of the rows; a non-blocking operation appears as `iall_reduce`, `isend` or
    `ireceive` (launch to completion) and, where the rank had to wait for it, as `wait`. With
    `check_order` every collective first compares its signature with all other ranks of its group
    and raises CommError where they differ; slow, and the quickest way to find out which collective
    deadlocks.
    """

    def __init__(self, *, check_order: bool = False, on_event: EventHook | None = None) -> None:
        self.rows: dict[RowKey, Row] = {}
        self.operations: deque[Operation] = deque(maxlen=NUM_RECENT)
        self.check_order = check_order
        self.on_event = on_event

    def row(self, axis: str, operation: str, kind: str) -> Row:
        """The row of that key, made if absent. Raises CommError for an unknown kind."""
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
        """Add one call. Communicators do this by themselves; call it for kind `window`: bytes read
        from or written to shared memory."""
        row = self.row(axis, operation, kind)
        row.calls += 1
        row.bytes += num_bytes
        row.seconds += seconds
        row.wire += wire_bytes(operation, num_bytes, group_size)

    def total(
        self,
        field_name: str = "bytes",
        *,
        axis: str | None = None,
        operation: str | None = None,
        kind: str | None = None,
    ) -> Any:
        """The sum of one field (`calls`, `bytes`, `seconds` or `wire`) over the rows that match."""
        wanted = (axis, operation, kind)
        rows = (
            row
            for key, row in self.rows.items()
            if all(want in (None, have) for want, have in zip(wanted, key, strict=True))
        )
        return sum(getattr(row, field_name) for row in rows)

    def payload(self) -> dict[tuple[str, str], int]:
        """Payload bytes by (axis, operation): what the closed formulas of the parallel methods
        predict."""
        return {
            (axis, operation): row.bytes
            for (axis, operation, kind), row in self.rows.items()
            if kind == "payload"
        }

    def wire_bytes(self, axis: str | None = None, kind: str | None = None) -> float:
        """Ring-equivalent bytes this rank has sent, see `wire_bytes` of this module."""
        return float(self.total("wire", axis=axis, kind=kind))

    def snapshot(self) -> dict[RowKey, Row]:
        """A copy of the rows, to take differences with `since`."""
        return {
            key: Row(row.calls, row.bytes, row.seconds, row.wire) for key, row in self.rows.items()
        }

    def since(self, before: dict[RowKey, Row]) -> dict[RowKey, Row]:
        """What was added after `before = ledger.snapshot()`; rows without new calls or seconds are
        left out."""
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

    def clear(self) -> None:
        """Forget all rows and operations."""
        self.rows.clear()
        self.operations.clear()

    def recent(self, count: int = 8) -> str:
        """The last operations, one a line, oldest first: what a time-out prints."""
        lines = [f"  {operation}" for operation in list(self.operations)[-count:]]
        return "last operations of this rank:\n" + ("\n".join(lines) if lines else "  (none)")

    def report(self) -> str:
        """The rows as a text table."""
        lines = [
            f"{'axis':<12} {'operation':<16} {'kind':<9} {'calls':>8} {'bytes':>16} "
            f"{'ring bytes':>16} {'seconds':>10}"
        ]
        for (axis, operation, kind), row in sorted(self.rows.items()):
            lines.append(
                f"{axis:<12} {operation:<16} {kind:<9} {row.calls:>8} {row.bytes:>16,} "
                f"{row.wire:>16,.0f} {row.seconds:>10.4f}"
            )
        return "\n".join(lines)


class Recording:
    """Context manager around one blocking operation: one row, one entry among the recent
    operations, one event."""

    __slots__ = ("axis", "group_size", "kind", "ledger", "name", "num_bytes", "operation", "row")

    def __init__(
        self,
        ledger: Ledger,
        axis: str,
        name: str,
        kind: str,
        num_bytes: int,
        group_size: int,
        detail: str = "",
    ) -> None:
        self.ledger = ledger
        self.name, self.axis, self.kind, self.num_bytes, self.group_size = (
            name,
            axis,
            kind,
            num_bytes,
            group_size,
        )
        self.row = ledger.row(axis, name, kind)
        self.operation = Operation(name, axis, detail, num_bytes, time.perf_counter())
        ledger.operations.append(self.operation)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if exc_type is not None:
            return
        end = self.operation.ended = time.perf_counter()
        row, start = self.row, self.operation.started
        row.calls += 1
        row.bytes += self.num_bytes
        row.seconds += end - start
        row.wire += wire_bytes(self.name, self.num_bytes, self.group_size)
        if self.ledger.on_event is not None:
            self.ledger.on_event(self.name, self.axis, start, end, self.num_bytes)


current_ledger: ContextVar[Ledger] = ContextVar("current_ledger")


def ledger() -> Ledger:
    """The ledger of this context (one per rank), made on first use."""
    found = current_ledger.get(None)
    if found is None:
        found = Ledger()
        current_ledger.set(found)
    return found


@contextmanager
def recording(**options: Any) -> Iterator[Ledger]:
    """Use a fresh `Ledger(**options)` within the block: `with recording() as counted: ...;
    counted.payload()`."""
    fresh = Ledger(**options)
    token = current_ledger.set(fresh)
    try:
        yield fresh
    finally:
        current_ledger.reset(token)


class _Ordered(Protocol):
    rank: int
    size: int
    name: str

    @property
    def order(self) -> OrderRecord: ...

    def gather_json(self, obj: Any) -> list[Any]: ...


@dataclass
class _Sequence:
    """One rank's order record as it arrived."""

    checksum: int
    count: int
    recent: dict[int, str] = field(default_factory=dict)

    def at(self, index: int) -> str:
        if index >= self.count:
            return "nothing"
        return self.recent.get(index, "an operation before the recorded ones")


def check_order(comm: _Ordered) -> None:
    """Compare what collectives the ranks of `comm` have run on it. Collective.

    Raises CommError on every rank, naming the first operation among the last NUM_RECENT in which
    they differ and which ranks ran what.
    """
    if comm.size == 1:
        return
    order = comm.order
    mine = {"checksum": order.checksum, "count": order.count, "recent": list(order.recent)}
    records = [
        _Sequence(r["checksum"], r["count"], {i: text for i, text in r["recent"]})
        for r in comm.gather_json(mine)
    ]
    if len({(record.checksum, record.count) for record in records}) == 1:
        return
    last = max(record.count for record in records)
    first = max(min(record.recent, default=0) for record in records)
    for index in range(first, last):
        seen: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            seen.setdefault(record.at(index), []).append(rank)
        if len(seen) > 1:
            raise CommError(
                f"ranks of {comm.name!r} ran different collectives: "
                f"{describe_difference(index, seen)}"
            )
    raise CommError(
        f"ranks of {comm.name!r} ran different collectives before the last {NUM_RECENT} of "
        f"{[record.count for record in records]}; "
        "call check_order more often to find the first"
    )


def describe_difference(index: int, seen: dict[str, list[int]]) -> str:
    """Text for "operation `index` differs": which ranks ran what."""
    return f"operation {index} was " + ", but ".join(
        f"{what} on ranks {ranks}" for what, ranks in seen.items()
    )
