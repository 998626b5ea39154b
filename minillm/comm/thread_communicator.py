"""Communicator of thread ranks: groups meet at a `Board` that they share.

Each rank brings a value, the last one to arrive computes the results, and each takes its own.
Reductions sum in rank order, so every rank gets the same bits.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from minillm.base.arrays import aligned_empty
from minillm.base.errors import CommError, PeerFailed
from minillm.comm.boards import Board, Consent, Decision, Meeting, Message, ThreadWindow
from minillm.comm.buffers import ReduceOp, cut, reduce_in_order
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.thread_works import Joined, MeetingWork, ReceiveWork, SendWork
from minillm.comm.work import SharedWindow, Work

LATE_SECONDS = 1e-3  # of odd ranks under `Faults`: another rank comes to its next call in this time


class ThreadCommunicator(Communicator):
    """A group of threads of one process."""

    def __init__(
        self,
        board: Board,
        rank: int,
        name: str,
        timeout: float,
        nodes: Sequence[int],
        family: list[Board] | None = None,
    ) -> None:
        super().__init__(rank, board.size, name, timeout)
        self._board, self._world = board, board.world
        self._nodes = tuple(nodes)
        self._number = self._consents = 0
        self._family = [] if family is None else family  # boards of this rank, to revoke
        self._family.append(board)
        self._receives: defaultdict[Any, deque[ReceiveWork]] = defaultdict(deque)

    def working(self, what: str) -> AbstractContextManager[None]:
        return self._world.work(what)

    # ---- meetings

    def _join(self, value: Any, compute: Callable[[list[Any]], list[Any]], what: str) -> Joined:
        """Bring `value` to this group's next meeting; the last to arrive computes all results."""
        self._call()
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
        return Joined(number, what)

    def _call(self) -> None:
        """Count a call for the faults of the world."""
        if self._world.faults is not None:
            self._world.faults.count(self._board.members[self.rank])

    def _check_peers(self) -> None:
        found = self._board.failure()
        if found is not None:
            raise PeerFailed(f"{found}, so operations on {self.name!r} cannot complete")

    def _is_complete(self, joined: Joined) -> bool:
        meeting = self._board.meetings.get(joined.number)
        if meeting is not None and meeting.results is not None:
            return True
        self._check_peers()
        return False

    def _take(self, joined: Joined) -> Any:
        """Wait for a meeting and take this rank's result.

        As under ULFM, a death after the last arrival fails the operation on some ranks, the odd
        ones here, and not on others.
        """
        number, what = joined
        late = self._world.faults is not None and self.rank % 2 == 1
        if late:
            time.sleep(LATE_SECONDS)
        with self._world.changed:
            meeting = self._board.meetings[number]
            self._world.wait_for(
                lambda: meeting.results is not None and not (late and self._board.failure()),
                f"operation {number} on {self.name!r} ({what})",
                self.timeout,
                self._board.failure,
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

        return MeetingWork(self, joined, finish)

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
        self._call()
        message = Message(flat.copy())
        with self._world.changed:
            self._board.messages[self.rank, dest, tag].append(message)
            self._world.changed.notify_all()
        return SendWork(self, message, dest, f"rank {dest} of {self.name!r} to receive tag {tag}")

    def _irecv(self, flat: np.ndarray, source: int, tag: int) -> Work:
        self._call()
        return ReceiveWork(self, flat, source, tag)

    def _recv_any(self, flat: np.ndarray, tag: int) -> int:
        self._call()
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
                lambda: self._board.failure(key[0] for key in keys),
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
                board = Board(self._world, [self._board.members[rank] for rank in members])
                boards[wanted] = board, members
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
            self._family,
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

    # ---- going on without dead ranks

    def unanimous(self, ok: bool = True) -> bool:
        return self._consent(ok, "unanimous").whole

    def shrink(self) -> Communicator:
        board = self._consent(True, "shrink").board
        rank = board.members.index(self._board.members[self.rank])
        nodes = [self._nodes[self._board.members.index(member)] for member in board.members]
        return ThreadCommunicator(board, rank, self.name, self.timeout, nodes)

    def respawn(
        self, places: Sequence[int], size: int, command: Sequence[str] = ()
    ) -> Communicator:
        world, start = self._world, self._world.start
        if start is None:
            raise CommError("no thread rank can be started: run_ranks has no `joining`")
        nodes = [self._nodes[0]] * size  # new ranks run beside the first survivor
        for node, place in zip(self._nodes, places, strict=True):
            nodes[place] = node

        def compute(parts: list[Any]) -> list[Board]:
            old = dict(zip(places, self._board.members, strict=True))
            new = {place: next(world.numbers) for place in range(size) if place not in old}
            board = Board(world, [(old | new)[place] for place in range(size)])
            for place, number in new.items():
                comm = ThreadCommunicator(board, place, self.name, self.timeout, nodes)
                start(number, comm)
            return [board] * self.size

        board = self._meet(None, compute, "respawn")
        return ThreadCommunicator(board, places[self.rank], self.name, self.timeout, nodes)

    def revoke(self) -> None:
        with self._world.changed:
            for board in self._family:
                board.revoked = True
            self._world.changed.notify_all()

    def _consent(self, value: bool, what: str) -> Decision:
        """Meet the living ranks, and return what they decide."""
        self._call()
        number, self._consents = self._consents, self._consents + 1
        with self._world.changed:
            consent = self._board.consents.setdefault(number, Consent())
            consent.values[self.rank] = value
            self._world.changed.notify_all()
            self._world.wait_for(
                lambda: consent.decide(self._board),
                f"{what} on {self.name!r}",
                self.timeout,
                lambda: None if self._world.failed is None else self._board.failure(),
            )
            self._world.changed.notify_all()
        assert consent.decided is not None
        return consent.decided
