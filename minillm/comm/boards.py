"""Shared state of thread ranks: meetings of collectives and mailboxes of messages."""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minillm.base.errors import CommTimeout, PeerFailed
from minillm.comm.ledger import ledger

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator


class Killed(BaseException):
    """End of a thread rank by `Faults`, which no code of the rank catches."""


class Faults:
    """Planned deaths of thread ranks: rank r ends at the start of its call number `kills[r]`.

    Calls of communication count from 1, on all communicators of a rank together. `calls` are those
    that each rank has made. Other ranks outlive the dead.
    """

    def __init__(self, kills: Mapping[int, int] | None = None) -> None:
        self.kills = dict(kills or {})
        self.calls: collections.Counter[int] = collections.Counter()

    def count(self, rank: int) -> None:
        """Count a call of `rank`. Raises Killed if it is the last one."""
        self.calls[rank] += 1
        if self.calls[rank] == self.kills.get(rank):
            raise Killed(rank)


class World:
    """State that all ranks of one `run_ranks` share.

    One lock, the first rank that raised an error, the dead ranks, and by thread name what each
    waiting rank waits for and what each working rank does.
    """

    def __init__(self, size: int, rendezvous: bool, faults: Faults | None = None) -> None:
        self.changed = threading.Condition()
        self.failed: int | None = None
        self.dead: set[int] = set()
        self.faults = faults
        self.start: Callable[[int, Communicator], object] | None = None
        """Start the rank of a new number on its communicator; None: no rank can be started."""
        self.numbers = itertools.count(size)  # of new ranks
        self.rendezvous = rendezvous
        self.waiting: dict[str, str] = {}
        self.working: dict[str, str] = {}

    @contextlib.contextmanager
    def work(self, what: str) -> Iterator[None]:
        """Stop the clocks of the other ranks inside the block, except while this rank waits."""
        name = threading.current_thread().name
        with self.changed:
            outer, self.working[name] = self.working.get(name), what
        try:
            yield
        finally:
            with self.changed:
                del self.working[name]
                if outer is not None:
                    self.working[name] = outer
                self.changed.notify_all()

    def wait_for(
        self,
        ready: Callable[[], bool],
        what: str,
        timeout: float,
        failure: Callable[[], str | None],
    ) -> None:
        """Wait, holding the lock, until `ready()`.

        Raises PeerFailed once `failure` returns why that will not be, and CommTimeout after
        `timeout` seconds, naming what every rank waits for.
        """
        name = threading.current_thread().name
        deadline = time.monotonic() + timeout
        while not ready():
            found = failure()
            if found is not None:
                raise PeerFailed(f"{found}, so {what} cannot complete")
            self.waiting[name] = what
            if self.working.keys() - self.waiting.keys():
                deadline = time.monotonic() + timeout
            left = deadline - time.monotonic()
            if left <= 0:
                others = "; ".join(
                    f"{who} waits for {which}" for who, which in sorted(self.waiting.items())
                )
                ledger().dump(f"waited {timeout:g} s for {what}")
                raise CommTimeout(
                    f"waited {timeout:g} s: {others}. Last operations here:\n{ledger().recent()}"
                )
            self.changed.wait(min(left, timeout / 4, 1.0))
        self.waiting.pop(name, None)


class Meeting:
    """Collective under way: the value of each rank, and the results once the last has come."""

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.arrived = 0
        self.results: list[Any] | None = None
        self.taken = 0


class Message:
    """Sent array; `received` once the receiver has taken it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.received = False


class Board:
    """Shared state of one group: meetings by number, messages by (source, destination, tag).

    `members` are the numbers of its ranks in the world. `consents` are meetings of the living.
    """

    def __init__(self, world: World, members: Sequence[int]) -> None:
        self.world, self.members, self.size = world, tuple(members), len(members)
        self.revoked = False
        self.meetings: dict[int, Meeting] = {}
        self.consents: dict[int, Consent] = {}
        self.messages: dict[tuple[int, int, int], collections.deque[Message]] = (
            collections.defaultdict(collections.deque)
        )

    def failure(self, ranks: Iterable[int] | None = None) -> str | None:
        """Return why an operation that needs `ranks` of this group cannot complete, None if it can.

        None: it needs all.
        """
        needed = range(self.size) if ranks is None else ranks
        dead = [rank for rank in needed if self.members[rank] in self.world.dead]
        if self.world.failed is not None:
            return f"rank {self.world.failed} has failed"
        if dead:
            return f"rank {self.members[dead[0]]} has failed"
        return "a rank has revoked the group" if self.revoked else None


class Consent:
    """Meeting of the living: `values` of those who have come, and what the last one has decided."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.decided: Decision | None = None

    def decide(self, board: Board) -> bool:
        """Return True once all living ranks have come. The first to see it decides for all."""
        living = {r for r, member in enumerate(board.members) if member not in board.world.dead}
        if self.decided is None and living <= self.values.keys():
            whole = len(living) == board.size and all(self.values.values())
            members = [board.members[rank] for rank in sorted(living)]
            self.decided = Decision(whole, Board(board.world, members))
        return self.decided is not None


class Decision(NamedTuple):
    """Decision of the living ranks of a group."""

    whole: bool  # every rank lives and has passed True
    board: Board  # of the living


class ThreadWindow:
    """Window among threads, which share all memory: `sync` is a barrier.

    `parts` are those of all ranks. The first barrier is recorded in the ledger, the other not.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        barrier: Callable[[], None],
        silent_barrier: Callable[[], None],
    ) -> None:
        self.parts = list(parts)
        self.sync, self._silent_barrier = barrier, silent_barrier

    def free(self) -> None:
        """Release the memory. Collective."""
        self._silent_barrier()
        self.parts = []
