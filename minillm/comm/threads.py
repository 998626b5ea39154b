"""Ranks as threads of one process: the same program and communicators without MPI, for tests.

`run_ranks(4, fn)` calls fn(comm) on four threads. With `rendezvous=True` a send completes only when
its receiver has arrived. An order that relies on buffering then deadlocks visibly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, TypeVar

from minillm.comm.boards import Board, Faults, Killed, World
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger, recording
from minillm.comm.single import SelfCommunicator
from minillm.comm.survivable import NotAdmitted
from minillm.comm.thread_communicator import ThreadCommunicator

T = TypeVar("T")


def run_ranks(
    n: int,
    fn: Callable[[Communicator], T],
    *,
    nodes: Sequence[int] | None = None,
    timeout: float = 60.0,
    rendezvous: bool = False,
    faults: Faults | None = None,
    joining: Callable[[Communicator], T] | None = None,
) -> list[T]:
    """Run fn(comm) on `n` thread ranks and return their results in rank order.

    Each rank has a copy of the caller's context and its own ledger. `nodes[r]` is the node that
    rank r pretends to run on. When a rank raises, the others get PeerFailed at their next
    operation, and the first error is raised here with a note that names the rank. Raises
    CommTimeout for a rank that waits longer than `timeout` seconds. With `faults` ranks die in
    silence, with the result None, and the others may go on without them.

    Ranks that `respawn` starts run joining(comm). They are numbered from `n` on in the order of
    their start, in `faults` as well, and their results follow in this order.
    """
    world = World(n, rendezvous, faults)
    board = Board(world, range(n))
    results: list[Any] = []
    errors: list[tuple[int, BaseException]] = []
    threads: list[threading.Thread] = []
    context = copy_context()

    def run(number: int, comm: Communicator, fn: Callable[[Communicator], T]) -> None:
        try:
            with recording(check_order=ledger().check_order):
                results[number] = fn(comm)
        except (Killed, NotAdmitted):
            with world.changed:
                world.dead.add(number)
                world.changed.notify_all()
        except BaseException as error:
            with world.changed:
                errors.append((number, error))
                if world.failed is None:
                    world.failed = number
                world.changed.notify_all()

    def add(number: int, comm: Communicator, fn: Callable[[Communicator], T]) -> threading.Thread:
        results.append(None)
        own = context.copy()
        thread = threading.Thread(
            target=own.run, args=(run, number, comm, fn), name=f"rank {number}", daemon=True
        )
        threads.append(thread)
        return thread

    if joining is not None:
        world.start = lambda number, comm: add(number, comm, joining).start()
    for r in range(n):
        alone = n == 1
        add(
            r,
            SelfCommunicator("world", timeout)
            if alone
            else ThreadCommunicator(board, r, "world", timeout, nodes or [0] * n),
            fn,
        )
    for thread in threads[:n]:
        thread.start()
    for thread in threads:  # grows while ranks start others
        thread.join()
    if errors:
        r, error = errors[0]
        error.add_note(f"raised on rank {r} of {n} thread ranks")
        raise error
    return results
