"""Ranks as threads of one process: the same program and communicators without MPI, for tests.

`run_ranks(4, fn)` calls fn(comm) on four threads. Groups meet at a `Board` that they share: each
rank brings a value, the last one to arrive computes the results, and each takes its own. Reductions
sum in rank order, so every rank gets the same bits. With `rendezvous=True` a send completes only
when its receiver has arrived. An order that relies on buffering then deadlocks visibly.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minillm.base.arrays import aligned_empty
from minillm.base.errors import CommError, PeerFailed
from minillm.comm.boards import Board, Meeting, Message, ThreadWindow, World
from minillm.comm.buffers import ReduceOp, cut, reduce_in_order
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger, recording
from minillm.comm.single import SelfCommunicator
from minillm.comm.work import SharedWindow, Work

T = TypeVar("T")


class _Joined(NamedTuple):
    """Number of a meeting that this rank has joined, and the name of the collective."""

    number: int
    what: str


class _MeetingWork:
    """Collective that this rank has joined and not yet finished."""

    def __init__(
        self, comm: ThreadCommunicator, joined: _Joined, finish: Callable[[Any], None]
    ) -> None:
        self._comm, self._joined, self._finish = comm, joined, finish
        self._done = False

    def test(self) -> bool:
        """Finish the collective if all ranks have joined it."""
        if not self._done and self._comm._is_complete(self._joined):
            self.wait()
        return self._done

    def wait(self) -> None:
        """Block until all ranks have joined; then finish the collective."""
        if not self._done:
            self._finish(self._comm._take(self._joined))
            self._done = True


class _SendWork:
    """Send: done when the receiver has come under rendezvous, otherwise at once."""

    def __init__(self, comm: ThreadCommunicator, message: Message, what: str) -> None:
        self._comm, self._message, self._what = comm, message, what

    def test(self) -> bool:
        """Return True once the send is done."""
        return self._message.received or not self._comm._world.rendezvous

    def wait(self) -> None:
        """Block until the send is done."""
        world = self._comm._world
        if world.rendezvous:
            with world.changed:
                world.wait_for(lambda: self._message.received, self._what, self._comm.timeout)


class _ReceiveWork:
    """Receive into `out`. Messages are matched with receives in the order of both launches."""

    def __init__(self, comm: ThreadCommunicator, out: np.ndarray, source: int, tag: int) -> None:
        self._comm, self._out, self._key = comm, out, (source, comm.rank, tag)
        self._done = False
        self._queue = comm._receives[self._key]  # of receives that are not done
        self._queue.append(self)

    def test(self) -> bool:
        """Receive the message if it has been sent."""
        while not self._done and self._comm._board.messages.get(self._key):
            self._queue[0]._take()
        return self._done

    def wait(self) -> None:
        """Block until the message has been received."""
        while not self._done:
            self._queue[0]._take()

    def _take(self) -> None:
        self._comm._receive(self._out, [self._key])
        self._done = True
        self._queue.popleft()


class ThreadCommunicator(Communicator):
    """A group of threads of one process."""

    def __init__(
        self, board: Board, rank: int, name: str, timeout: float, nodes: Sequence[int]
    ) -> None:
        super().__init__(rank, board.size, name, timeout)
        self._board, self._world = board, board.world
        self._nodes = tuple(nodes)
        self._number = 0
        self._receives: defaultdict[Any, deque[_ReceiveWork]] = defaultdict(deque)

    def working(self, what: str) -> AbstractContextManager[None]:
        return self._world.work(what)

    # ---- meetings

    def _join(self, value: Any, compute: Callable[[list[Any]], list[Any]], what: str) -> _Joined:
        """Bring `value` to this group's next meeting; the last to arrive computes all results."""
        number, self._number = self._number, self._number + 1
        with self._world.changed:
            self._check_peers()
            meeting = self._board.meetings.setdefault(number, Meeting(self.size))
            meeting.brought[self.rank] = value
            meeting.arrived += 1
            if meeting.arrived == self.size:
                meeting.results = compute(meeting.brought)
                meeting.brought = []
                self._world.changed.notify_all()
        return _Joined(number, what)

    def _check_peers(self) -> None:
        if self._world.failed is not None:
            raise PeerFailed(
                f"rank {self._world.failed} has failed, so operations on {self.name!r} cannot "
                "complete"
            )

    def _is_complete(self, joined: _Joined) -> bool:
        self._check_peers()
        meeting = self._board.meetings.get(joined.number)
        return meeting is not None and meeting.results is not None

    def _take(self, joined: _Joined) -> Any:
        """Wait for a meeting and take this rank's result."""
        number, what = joined
        with self._world.changed:
            meeting = self._board.meetings[number]
            self._world.wait_for(
                lambda: meeting.results is not None,
                f"operation {number} on {self.name!r} ({what})",
                self.timeout,
            )
            meeting.taken += 1
            if meeting.taken == self.size:
                del self._board.meetings[number]
            assert meeting.results is not None
            return meeting.results[self.rank]

    def _meet(self, value: Any, compute: Callable[[list[Any]], list[Any]], what: str) -> Any:
        return self._take(self._join(value, compute, what))

    # ---- collectives. The results of a meeting may be shared: a rank that writes to one copies it.

    def _all_reduce(self, flat: np.ndarray, op: ReduceOp) -> None:
        flat[...] = self._meet(
            flat.copy(), lambda parts: [self._reduced(parts, op)] * self.size, "all_reduce"
        )

    def _iall_reduce(self, flat: np.ndarray, op: ReduceOp) -> Work:
        joined = self._join(
            flat.copy(), lambda parts: [self._reduced(parts, op)] * self.size, "iall_reduce"
        )
        # NaN, or -1: a reader before the end of the Work must not find the old values
        flat.view(np.uint8)[...] = 0xFF

        def finish(result: np.ndarray) -> None:
            flat[...] = result

        return _MeetingWork(self, joined, finish)

    def _reduced(self, parts: list[np.ndarray], op: ReduceOp) -> np.ndarray:
        kinds = {(part.shape, part.dtype) for part in parts}
        if len(kinds) > 1:
            raise CommError(
                f"ranks of {self.name!r} reduce different arrays: {sorted(map(str, kinds))}"
            )
        return reduce_in_order(parts, op)

    def _all_gather(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        return self._meet(
            flat.copy(), lambda parts: [np.concatenate(parts)] * self.size, "all_gather"
        ).copy()

    def _gather_into(self, out: np.ndarray, counts: list[int]) -> None:
        first = sum(counts[: self.rank])
        out[...] = self._all_gather(out[first : first + counts[self.rank]], counts)

    def _reduce_scatter(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        def compute(parts: list[np.ndarray]) -> list[np.ndarray]:
            return cut(self._reduced(parts, ReduceOp.SUM), counts)

        return self._meet(flat.copy(), compute, "reduce_scatter").copy()

    def _all_to_all(self, parts: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        received = self._meet(
            [part.copy() for part in parts],
            lambda table: [list(column) for column in zip(*table, strict=True)],
            "all_to_all",
        )
        for source, (part, count) in enumerate(zip(received, counts, strict=True)):
            if part.size != count:
                raise CommError(
                    f"all_to_all on {self.name!r}: rank {source} sent {part.size} elements where "
                    f"{count} were expected"
                )
        return received

    def _broadcast(self, flat: np.ndarray, root: int) -> None:
        data = self._meet(
            flat.copy() if self.rank == root else None,
            lambda parts: [parts[root]] * self.size,
            "broadcast",
        )
        if self.rank != root:
            if data.nbytes != flat.nbytes:
                raise CommError(
                    f"broadcast on {self.name!r}: the root has {data.nbytes} bytes, rank "
                    f"{self.rank} expects {flat.nbytes}"
                )
            flat[...] = data

    def _barrier(self) -> None:
        self._meet(None, lambda parts: parts, "barrier")

    # ---- messages

    def _isend(self, flat: np.ndarray, dest: int, tag: int) -> Work:
        message = Message(flat.copy())
        with self._world.changed:
            self._board.messages[self.rank, dest, tag].append(message)
            self._world.changed.notify_all()
        return _SendWork(self, message, f"rank {dest} of {self.name!r} to receive tag {tag}")

    def _irecv(self, flat: np.ndarray, source: int, tag: int) -> Work:
        return _ReceiveWork(self, flat, source, tag)

    def _recv_any(self, flat: np.ndarray, tag: int) -> int:
        return self._receive(flat, [(source, self.rank, tag) for source in range(self.size)])

    def _iprobe(self, tag: int) -> int | None:
        with self._world.changed:
            self._check_peers()
            messages = self._board.messages
            found = (r for r in range(self.size) if messages.get((r, self.rank, tag)))
            return next(found, None)

    def _receive(self, out: np.ndarray, keys: list[tuple[int, int, int]]) -> int:
        """Copy the first message under any of `keys` into `out`; return its source."""
        sources = ", ".join(str(key[0]) for key in keys)
        with self._world.changed:
            self._world.wait_for(
                lambda: any(self._board.messages.get(key) for key in keys),
                f"a message from rank {sources} of {self.name!r}, tag {keys[0][2]}",
                self.timeout,
            )
            key = next(key for key in keys if self._board.messages.get(key))
            message = self._board.messages[key].popleft()
            message.received = True
            self._world.changed.notify_all()
        if message.data.nbytes != out.nbytes:
            raise CommError(
                f"message of {message.data.nbytes} bytes does not fit the receive of {out.nbytes} "
                f"bytes (tag {key[2]} on {self.name!r})"
            )
        out[...] = message.data
        return key[0]

    # ---- groups and shared memory

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        def compute(wishes: list[tuple[int | None, int, int]]) -> list[Any]:
            boards: dict[int, tuple[Board, list[int]]] = {}
            for wanted in {c for c, _, _ in wishes if c is not None}:
                members = [
                    rank
                    for c, _, rank in sorted(
                        (w for w in wishes if w[0] == wanted), key=lambda w: (w[1], w[2])
                    )
                    if c == wanted
                ]
                boards[wanted] = Board(self._world, len(members)), members
            return [None if c is None else boards[c] for c, _, _ in wishes]

        made = self._meet((color, self.rank if key is None else key, self.rank), compute, "split")
        if made is None:
            return None
        board, members = made
        name = name or self.name
        if board.size == 1:
            return SelfCommunicator(name, self.timeout)
        return ThreadCommunicator(
            board,
            members.index(self.rank),
            name,
            self.timeout,
            [self._nodes[rank] for rank in members],
        )

    def split_by_node(self) -> Communicator:
        group = self.split(self._nodes[self.rank], self.rank, "node")
        assert group is not None
        return group

    def dup(self, name: str) -> Communicator:
        group = self.split(0, self.rank, name)
        assert group is not None
        return group

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        if len(set(self._nodes)) > 1:
            raise CommError(
                f"ranks of {self.name!r} lie on nodes {sorted(set(self._nodes))} and cannot share "
                "memory; use split_by_node()"
            )
        own = aligned_empty((nbytes,), np.uint8)
        own[...] = 0
        parts = self._meet(own, lambda parts: [list(parts)] * self.size, "alloc_shared")
        return ThreadWindow(parts, self.barrier, self._barrier)


def run_ranks(
    n: int,
    fn: Callable[[Communicator], T],
    *,
    nodes: Sequence[int] | None = None,
    timeout: float = 60.0,
    rendezvous: bool = False,
) -> list[T]:
    """Run fn(comm) on `n` thread ranks and return their results in rank order.

    Each rank has a copy of the caller's context and its own ledger. `nodes[r]` is the node that
    rank r pretends to run on. When a rank raises, the others get PeerFailed at their next
    operation, and the first error is raised here with a note that names the rank. Raises
    CommTimeout for a rank that waits longer than `timeout` seconds.
    """
    world = World(rendezvous)
    board = Board(world, n)
    results: list[Any] = [None] * n
    errors: list[tuple[int, BaseException]] = []

    def rank(r: int) -> None:
        comm: Communicator = (
            SelfCommunicator("world", timeout)
            if n == 1
            else ThreadCommunicator(board, r, "world", timeout, nodes or [0] * n)
        )
        try:
            with recording(check_order=ledger().check_order):
                results[r] = fn(comm)
        except BaseException as error:
            with world.changed:
                errors.append((r, error))
                if world.failed is None:
                    world.failed = r
                world.changed.notify_all()

    contexts = [copy_context() for _ in range(n)]
    threads = [
        threading.Thread(target=contexts[r].run, args=(rank, r), name=f"rank {r}", daemon=True)
        for r in range(n)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        r, error = errors[0]
        error.add_note(f"raised on rank {r} of {n} thread ranks")
        raise error
    return results
