"""Watchdog of an MPI rank: a thread that ends waits which exceed their time-out.

Small collectives block inside MPI, where no Python code can look at a clock. A thread looks instead
and sees every wait, whatever call it is in. Four times in five it has nothing to do:

1. It counts the time of the wait that the rank is in, and only time in which this process ran. A
   pause of the whole job, as by SIGSTOP or a suspended laptop, is therefore no time-out.
2. A rank inside `Communicator.working` sends a signal about each second, unless it waits itself. A
   signal sets the time of every wait to zero: the work of one rank is no time-out.
3. When a wait has lasted too long, it asks all ranks for their state. A stopped process is the one
   that does not answer. The message names it, the place in the code of a rank that is busy, and the
   last operation of every rank. All ranks that answer write their operations (recorder.py).
4. A wait that polls raises CommTimeout. One that blocks inside MPI ends the process and all ranks.

The threads talk by small messages on MPI.COMM_WORLD, which carries nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from mpi4py import MPI

from minillm.base.errors import CommTimeout, PeerFailed
from minillm.base.number_ranges import ranges
from minillm.comm.ledger import Ledger, ledger

TICK = 0.1  # s between looks; a look takes some 20 us
SIGNAL_SECONDS = 1.0  # between two signals of a rank that works alone
ANSWER_SECONDS = 1.0  # for the state of another rank
TAG = 1
SHOWN = 6  # different states of each kind in a message

# Errors of arguments and sizes: bugs, which are reported with their traceback.
_BUGS = (
    MPI.ERR_ARG, MPI.ERR_BUFFER, MPI.ERR_COMM, MPI.ERR_COUNT, MPI.ERR_GROUP, MPI.ERR_OP,
    MPI.ERR_RANK, MPI.ERR_REQUEST, MPI.ERR_ROOT, MPI.ERR_TAG, MPI.ERR_TRUNCATE, MPI.ERR_TYPE,
    MPI.ERR_WIN,
)  # fmt: skip


class Waiting:
    """Wait of this rank as a context manager; `polled` if the caller calls `check`.

    An MPI error inside becomes PeerFailed.
    """

    __slots__ = ("axis", "book", "expired", "polled", "timeout", "watchdog", "what")

    def __init__(
        self, watchdog: Watchdog, what: str, axis: str, timeout: float, polled: bool
    ) -> None:
        self.watchdog, self.what, self.axis = watchdog, what, axis
        self.timeout, self.polled = timeout, polled
        self.book = watchdog.book = ledger()
        self.expired: str | None = None

    def __enter__(self) -> Waiting:
        self.watchdog.waiting = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        self.watchdog.waiting = None
        if kind is not None and issubclass(kind, MPI.Exception):
            found = peer_failed(error, str(self))
            if found is not None:
                raise found from error

    def __str__(self) -> str:
        return f"{self.what} on {self.axis!r}"

    def check(self) -> None:
        """Raise CommTimeout if the watchdog has ended this wait."""
        if self.expired is not None:
            raise CommTimeout(self.expired)


def peer_failed(error: MPI.Exception, what: str) -> PeerFailed | None:
    """Return the error to raise for one of MPI, or None if it is a bug here."""
    if error.Get_error_class() in _BUGS:
        return None
    return PeerFailed(
        f"another rank has ended, so {what} cannot complete ({error.Get_error_string()})"
    )


class Watchdog:
    """Watchdog of this process.

    `end(error)` must end all ranks. Without MPI_THREAD_MULTIPLE the threads exchange no messages:
    time-outs then act without naming a rank, and work of one rank counts as waiting.
    """

    def __init__(self, end: Callable[[CommTimeout], object]) -> None:
        self.waiting: Waiting | None = None
        self.book: Ledger = ledger()
        """The ledger of the latest wait."""
        self._end = end
        self._comm: MPI.Comm = MPI.COMM_WORLD
        self._lock = threading.Lock()  # of the messages, while a rank moves to another group
        self._talks = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._works: list[tuple[str, float]] = []  # name and time-out
        self._next_signal = 0.0
        self._states: dict[int, str] = {}
        self._heard = False
        self._sent: list[tuple[MPI.Request, bytes]] = []
        self._count_anew()
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # before MPI_Finalize: no other thread may be inside MPI then

    def _count_anew(self) -> None:
        """Begin the counts of messages to each rank, and from it."""
        self._num_sent = array("q", [0] * self._comm.Get_size())
        self._num_received = array("q", [0] * self._comm.Get_size())

    def move(self, comm: MPI.Comm) -> None:
        """Talk with the ranks of `comm` alone from now on: others are lost."""
        with self._lock:
            self._comm, self._sent = comm, []
            self._count_anew()

    def stop(self) -> None:
        """End the thread, and take the messages under way.

        MPICH kills the job if MPI_Finalize finds one that was never received. All ranks that end
        come here; one that does not costs the others `ANSWER_SECONDS`.
        """
        self._stop.set()
        self._thread.join(2 * ANSWER_SECONDS)
        if not self._talks or self._thread.is_alive():
            return
        with contextlib.suppress(MPI.Exception):  # of a rank that has ended without this
            self._take_all()

    def _take_all(self) -> None:
        """Take the messages under way to this rank, all ranks together."""
        expected, deadline = bytearray(8 * len(self._num_sent)), time.monotonic() + ANSWER_SECONDS
        request = self._comm.Ialltoall([self._num_sent, MPI.INT64_T], [expected, MPI.INT64_T])
        while not request.Test():
            if time.monotonic() > deadline:
                return
            time.sleep(1e-3)
        while list(self._num_received) != list(memoryview(expected).cast("q")):
            if time.monotonic() > deadline:
                return
            self._receive()
        MPI.Request.Waitall([request for request, _ in self._sent])

    @contextlib.contextmanager
    def working(self, what: str, timeout: float) -> Iterator[None]:
        """Signal to the other ranks inside the block that this one works."""
        self._works.append((what, timeout))
        try:
            yield
        finally:
            self._works.pop()

    def _run(self) -> None:
        last, age, seen = time.monotonic(), 0.0, self.waiting
        while not self._stop.wait(TICK):
            now = time.monotonic()
            ran, last = min(now - last, 2 * TICK), now
            waiting = self.waiting
            if self._talks:
                # A rank that has ended is found by the main thread.
                with self._lock, contextlib.suppress(MPI.Exception):
                    self._receive()
                    self._signal(now, idle=waiting is not None and waiting is seen)
            if waiting is None or waiting is not seen or self._heard:
                age, seen, self._heard = 0.0, waiting, False
                continue
            age += ran
            if age > waiting.timeout and waiting.expired is None:
                self._expire(waiting)

    def _signal(self, now: float, idle: bool) -> None:
        """Tell all ranks about each second that this one works, unless it waits itself."""
        self._sent = [(request, text) for request, text in self._sent if not request.Test()]
        works = self._works[-1:]
        if not works or idle or now < self._next_signal:
            return
        (_, timeout), *_ = works
        self._next_signal = now + min(SIGNAL_SECONDS, timeout / 4)
        self._send_all({"working": True})

    def _send_all(self, message: Mapping[str, Any]) -> None:
        for rank in range(self._comm.Get_size()):
            if rank != self._comm.Get_rank():
                self._send(message, rank)

    def _send(self, message: Mapping[str, Any], rank: int) -> None:
        text = json.dumps(message).encode()
        self._sent.append((self._comm.Isend([text, MPI.BYTE], rank, TAG), text))
        self._num_sent[rank] += 1

    def _receive(self) -> None:
        """Take all messages of other watchdogs, and answer their questions."""
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, TAG, status):
            text, rank = bytearray(status.Get_count(MPI.BYTE)), status.Get_source()
            self._comm.Recv([text, MPI.BYTE], rank, TAG)
            self._num_received[rank] += 1
            message = json.loads(bytes(text))
            if "state" in message:
                self._states[rank] = message["state"]
            elif "working" in message:
                self._heard = True
            elif not self._stop.is_set():
                self._send({"state": self._state()}, rank)
                self.book.dump(f"a wait of rank {rank} exceeded --comm-timeout")

    def _state(self) -> str:
        """Return what this rank does, as the end of a sentence about it."""
        waiting, works = self.waiting, self._works[-1:]
        last = f"; last: {self.book.operations[-1].describe()}" if self.book.operations else ""
        if waiting is not None:
            return f"waits for {waiting}{last}"
        frame = sys._current_frames().get(self._watched)
        place = ""
        if frame is not None:
            code = frame.f_code
            place = f" at {os.path.basename(code.co_filename)}:{frame.f_lineno} ({code.co_name})"
        return f"is {works[0][0] if works else 'busy'}{place}{last}"

    def _ask(self) -> dict[int, str]:
        """Return the state of each other rank that answers within ANSWER_SECONDS."""
        self._states = {}
        with self._lock, contextlib.suppress(MPI.Exception):
            self._ask_all()
        return self._states

    def _ask_all(self) -> None:
        if self._talks:
            self._send_all({"ask": True})
            deadline = time.monotonic() + ANSWER_SECONDS
            while len(self._states) < self._comm.Get_size() - 1 and time.monotonic() < deadline:
                time.sleep(TICK / 5)
                self._receive()

    def _expire(self, waiting: Waiting) -> None:
        """End a wait: the lowest rank that waits speaks, the others a second later if at all."""
        states = self._ask()
        own = self._comm.Get_rank()
        if any(rank < own and state.startswith("waits") for rank, state in states.items()):
            self._stop.wait(ANSWER_SECONDS)
        if self.waiting is not waiting or self._stop.is_set():
            return
        size = self._comm.Get_size() if self._talks else 1
        text = (
            f"waited {waiting.timeout:g} s (--comm-timeout) for {waiting}"
            f"{describe(states, own, size)}\n{waiting.book.recent()}"
        )
        self.book.dump(f"waited {waiting.timeout:g} s for {waiting}")
        waiting.expired = text
        if not waiting.polled:
            self._end(CommTimeout(text))


def describe(states: Mapping[int, str], own: int, size: int) -> str:
    """Return lines about the other ranks: first the silent ones, then the busy, then the waiting.

    `states[r]` is what rank r does, absent if it does not answer.
    """
    silent = [rank for rank in range(size) if rank != own and rank not in states]
    waits = [rank for rank, state in sorted(states.items()) if state.startswith("waits")]
    busy = [rank for rank in sorted(states) if rank not in waits]
    absent = sorted([*silent, *busy])
    lines = [f"  missing: {_named(absent)}"] if absent else []
    for ranks in (silent, busy, waits):
        alike: dict[str, list[int]] = {}
        for rank in ranks:
            state = states.get(rank, "does not answer: it is stopped, or hangs")
            alike.setdefault(state, []).append(rank)
        for state, (first, *rest) in list(alike.items())[:SHOWN]:
            lines.append(f"  rank {first} {state}" + (f" (and {_named(rest)})" if rest else ""))
        if len(alike) > SHOWN:
            others = sum(map(len, list(alike.values())[SHOWN:]))
            lines.append(f"  and {others} more ranks like the last")
    return "".join(f"\n{line}" for line in lines)


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {ranges(ranks)}"
