"""The operations of a transport that carry arrays between ranks."""

from __future__ import annotations

from minillm.base.arrays import Array, namespace
from minillm.base.errors import CommError
from minillm.comm.buffers import ReduceOp, cut, even_counts, reduce_in_order, sum_into
from minillm.comm.checks import MAX_TAG
from minillm.comm.work import AllWork, ThenWork, Work


class Transport:
    """Operations among `size` ranks on flat buffers, each implemented by a way of communication.

    Buffers are C-contiguous and 1-D, counts are in elements, and arguments are checked already.
    `Communicator` makes public collectives of them. `timeout` is in seconds.
    """

    def __init__(self, rank: int, size: int, name: str, timeout: float) -> None:
        self.rank, self.size, self.name = rank, size, name
        self.timeout = timeout

    def _all_reduce(self, flat: Array, op: ReduceOp) -> None:
        raise self._unsupported("all_reduce")

    def _iall_reduce(self, flat: Array, op: ReduceOp) -> Work:
        raise self._unsupported("iall_reduce")

    def _all_gather(self, flat: Array, counts: list[int]) -> Array:
        raise self._unsupported("all_gather")

    def _gather_into(self, out: Array, counts: list[int]) -> None:
        """Complete `out`, which holds this rank's part, with the parts of the other ranks."""
        raise self._unsupported("all_gather")

    def _reduce_scatter(self, flat: Array, counts: list[int]) -> Array:
        raise self._unsupported("reduce_scatter")

    def _all_to_all(self, parts: list[Array], counts: list[int]) -> list[Array]:
        """Exchange by messages between each two ranks, each of any size."""
        xp = namespace(parts[0])
        received = [xp.empty(count, part.dtype) for count, part in zip(counts, parts, strict=True)]
        received[self.rank][...] = parts[self.rank]
        others = [r for r in range(self.size) if r != self.rank]
        AllWork(
            [self._irecv(received[r], r, MAX_TAG) for r in others]
            + [self._isend(parts[r], r, MAX_TAG) for r in others]
        ).wait()
        return received

    def _ireduce_scatter(self, flat: Array, counts: list[int]) -> Work:
        """Launch the sum of this rank's slice of `flat` over the ranks, in rank order, in place."""
        parts = cut(flat, counts)
        mine, others = parts[self.rank], [r for r in range(self.size) if r != self.rank]
        received = {r: namespace(flat).empty_like(mine) for r in others} | {self.rank: mine}
        messages = [self._irecv(received[r], r, MAX_TAG) for r in others]
        messages += [self._isend(parts[r], r, MAX_TAG) for r in others]

        def add_up() -> None:
            sum_into(mine, [received[r] for r in range(self.size)])

        return ThenWork(AllWork(messages), flat, add_up)

    def _iall_gather(self, flat: Array, counts: list[int]) -> Work:
        """Launch the completion of `flat`, which holds this rank's slice, with the others'."""
        parts = cut(flat, counts)
        others = [r for r in range(self.size) if r != self.rank]
        messages = [self._irecv(parts[r], r, MAX_TAG) for r in others]
        messages += [self._isend(parts[self.rank], r, MAX_TAG) for r in others]
        return ThenWork(AllWork(messages), flat)

    def _broadcast(self, flat: Array, root: int) -> None:
        raise self._unsupported("broadcast")

    def _isend(self, flat: Array, dest: int, tag: int) -> Work:
        raise self._unsupported("send")

    def _irecv(self, flat: Array, source: int, tag: int) -> Work:
        raise self._unsupported("receive")

    def _recv_any(self, flat: Array, tag: int) -> int:
        raise self._unsupported("recv_any")

    def _iprobe(self, tag: int) -> int | None:
        raise self._unsupported("iprobe")

    def _barrier(self) -> None:
        raise self._unsupported("barrier")

    def _reduce_slices(self, flat: Array, op: ReduceOp) -> None:
        """All-reduce by exchanging slices, reducing each in rank order, and gathering.

        2-byte floats are rounded once, and every rank has the same bits.
        """
        counts = even_counts(flat.size, self.size)
        mine = self._all_to_all(cut(flat, counts), [counts[self.rank]] * self.size)
        flat[...] = self._all_gather(reduce_in_order(mine, op), counts)

    def _unsupported(self, operation: str) -> CommError:
        return CommError(f"{type(self).__name__} has no {operation}")
