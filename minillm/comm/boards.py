"""Shared state of thread ranks: meetings of collectives and mailboxes of messages."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minillm.base.errors import CommTimeout, PeerFailed
from minillm.comm.ledger import ledger


class World:
    """State that all ranks of one `run_ranks` share.

    One lock, the first failed rank, and by thread name what each waiting rank waits for and what
    each working rank does.
    """

    def __init__(self, rendezvous: bool) -> None:
        self.changed = threading.Condition()
        self.failed: int | None = None
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

    def wait_for(self, ready: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait, holding the lock, until `ready()`.

        Raises PeerFailed when another rank has failed, and CommTimeout after `timeout` seconds,
        naming what every rank waits for.
        """
        name = threading.current_thread().name
        deadline = time.monotonic() + timeout
        while not ready():
            if self.failed is not None:
                raise PeerFailed(f"rank {self.failed} has failed, so {what} cannot complete")
            self.waiting[name] = what
            if self.working.keys() - self.waiting.keys():
                deadline = time.monotonic() + timeout
            left = deadline - time.monotonic()
            if left <= 0:
                others = "; ".join(
                    f"{who} waits for {which}" for who, which in sorted(self.waiting.items())
                )
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
    """Shared state of one group: meetings by number, messages by (source, destination, tag)."""

    def __init__(self, world: World, size: int) -> None:
        self.world, self.size = world, size
        self.meetings: dict[int, Meeting] = {}
        self.messages: dict[tuple[int, int, int], collections.deque[Message]] = (
            collections.defaultdict(collections.deque)
        )


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
