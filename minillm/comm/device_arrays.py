"""Arrays on GPUs between ranks: a `Communicator` around another one, which moves what lies in host
memory.

Where MPI takes device memory, it gets the device's addresses. Elsewhere arrays travel through
pinned host memory, chunk by chunk (staging.py); what is reduced in the background, a bucket of
gradients, is one chunk. Nothing is sent before the device has written it: the host waits, or, for a
reduction in the background, looks again whenever it is polled, so that it can go on queueing work.
Sums of 2-byte floats are exchanged by slices, added in rank order in float32 and rounded once, as
among hosts. Arrays of the host pass through untouched.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minillm.base.arrays import Array, is_narrow
from minillm.base.device import CPU, Device
from minillm.comm.base import BaseCommunicator, reduce_in_order
from minillm.comm.communicator import MAX_TAG, SUM, Communicator, ReduceOp, SharedWindow, Work
from minillm.comm.staging import Staging, Turn, pieces, slices
from minillm.comm.work import AllWork, DoneWork


def on_device(comm: Communicator, device: Device, direct: bool | None = None) -> Communicator:
    """`comm` for arrays of `device` as well. `direct` says whether it takes device memory as it is
    (None: as the MPI library says)."""
    if device is CPU or comm.size == 1:
        return comm
    if direct is None:
        from minillm.comm.mpi import takes_device_memory

        direct = takes_device_memory()
    assert isinstance(comm, BaseCommunicator)
    return DirectCommunicator(comm, device) if direct else StagedCommunicator(comm, device)


class _Then:
    """A Work that does something more once the inner one is done, and keeps an array alive until
    then."""

    def __init__(self, work: Work, keep: Array, then: Callable[[], None] | None = None) -> None:
        self._work: Work | None = work
        self._keep, self._then = keep, then

    def _finish(self) -> None:
        self._work = None
        if self._then is not None:
            self._then()
        self._keep = None

    def test(self) -> bool:
        """See `Work`."""
        if self._work is not None and self._work.test():
            self._finish()
        return self._work is None

    def wait(self) -> None:
        """See `Work`."""
        if self._work is not None:
            self._work.wait()
            self._finish()


def _on_host(x: Array) -> bool:
    return isinstance(x, np.ndarray)


class _DeviceCommunicator(BaseCommunicator):
    """What both ways share: groups, control, and the passing through of host arrays."""

    def __init__(self, inner: BaseCommunicator, device: Device) -> None:
        super().__init__(inner.rank, inner.size, inner.name, inner.timeout)
        self.inner: Any = (
            inner  # a BaseCommunicator, whose operations on flat buffers are called here
        )
        self.device = device

    def _wrap(self, made: Any) -> Any:
        return made if made is None or made.size == 1 else self._around(made)

    def _around(self, made: Any) -> Communicator:
        return type(self)(made, self.device)

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        """A group of the ranks with the same `color`, ordered by (key, rank); None where the color
        is None. Collective."""
        self._start_reductions()
        return self._wrap(self.inner.split(color, key, name))

    def split_by_node(self) -> Communicator:
        """The ranks of this group on the same node. Collective."""
        self._start_reductions()
        return self._wrap(self.inner.split_by_node())

    def dup(self, name: str) -> Communicator:
        """The same ranks under another name, with messages of their own. Collective."""
        self._start_reductions()
        return self._wrap(self.inner.dup(name))

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        """Host memory that every rank of the group sees. Collective."""
        self._start_reductions()
        return self.inner.alloc_shared(nbytes)

    def _barrier(self) -> None:
        self._start_reductions()
        self.inner._barrier()

    def _start_reductions(self, wait: bool = True) -> None:
        """Nothing waits to be started."""

    def _all_to_all(self, parts: list[Array], counts: list[int]) -> list[Array]:
        """By messages between each two ranks, whose sizes nobody else knows."""
        self._start_reductions()
        if _on_host(parts[0]):
            return self.inner._all_to_all(parts, counts)
        received = [
            self.device.xp.empty(count, part.dtype)
            for count, part in zip(counts, parts, strict=True)
        ]
        received[self.rank][...] = parts[self.rank]
        others = [r for r in range(self.size) if r != self.rank]
        AllWork(
            [self._irecv(received[r], r, MAX_TAG) for r in others]
            + [self._isend(parts[r], r, MAX_TAG) for r in others]
        ).wait()
        return received


class _Reduction:
    """A Work that reduces in the background what has first to come down from the device. Those of a
    group start in their order, since all ranks must run the same collectives in the same order."""

    def __init__(self, comm: StagedCommunicator, flat: Array, op: ReduceOp) -> None:
        self._comm, self._flat, self._op = comm, flat, op
        self._host = comm.staging.pinned(flat.nbytes)
        self.down = comm.staging.start_download(flat, self._host)
        self._work: Work | None = None
        self._done = False

    def start(self) -> None:
        """It has come down: reduce it."""
        self._work = self._comm.inner._iall_reduce(self._host.view(self._flat.dtype), self._op)

    def test(self) -> bool:
        """See `Work`."""
        self._comm._start_reductions(wait=False)
        if not self._done and self._work is not None and self._work.test():
            self._finish()
        return self._done

    def wait(self) -> None:
        """See `Work`."""
        self._comm._start_reductions(wait=True)
        if not self._done:
            assert self._work is not None
            self._work.wait()
            self._finish()

    def _finish(self) -> None:
        self._comm.staging.upload(self._host, self._flat)
        self._done = True


class StagedCommunicator(_DeviceCommunicator):
    """Device arrays by way of pinned host memory, which groups share with the communicator that
    they were made from."""

    def __init__(
        self, inner: BaseCommunicator, device: Device, staging: Staging | None = None
    ) -> None:
        super().__init__(inner, device)
        self.staging = staging or Staging(device)
        self._coming: deque[_Reduction] = deque()

    def _around(self, made: Any) -> Communicator:
        return StagedCommunicator(made, self.device, self.staging)

    def _start_reductions(self, wait: bool = True) -> None:
        """Start those background reductions that have come down; with `wait`, all of them: before
        any other collective of this group."""
        while self._coming and (wait or self._coming[0].down.done):
            self._coming[0].down.synchronize()
            self._coming.popleft().start()

    # ---- operations on flat buffers

    def _all_reduce(self, flat: Array, op: ReduceOp) -> None:
        self._start_reductions()
        if _on_host(flat):
            return self.inner._all_reduce(flat, op)
        turns = [
            Turn(part.size, [(0, part)], lambda host: self.inner._all_reduce(host, op), [(0, part)])
            for part in pieces(flat)
        ]
        self.staging.through(flat.dtype, turns)

    def _iall_reduce(self, flat: Array, op: ReduceOp) -> Work:
        if _on_host(flat) or not flat.size:
            self._start_reductions()
            return self.inner._iall_reduce(flat if _on_host(flat) else np.empty(0, flat.dtype), op)
        if (
            is_narrow(flat.dtype) or flat.dtype.kind == "b"
        ):  # by messages for which ranks wait: not from within a poll
            self._all_reduce(flat, op)
            return DoneWork()
        self._coming.append(_Reduction(self, flat, op))
        return self._coming[-1]

    def _all_gather(self, flat: Array, counts: list[int]) -> Array:
        self._start_reductions()
        if _on_host(flat):
            return self.inner._all_gather(flat, counts)
        out = self.device.xp.empty(sum(counts), flat.dtype)
        shards = _cut(out, counts)
        shards[self.rank][...] = flat
        turns = []
        for parts in slices(shards):
            sizes, places = _layout(parts)
            up = [place for r, place in enumerate(places) if r != self.rank]
            turns.append(
                Turn(
                    sum(sizes),
                    [places[self.rank]],
                    partial(self.inner._gather_into, counts=sizes),
                    up,
                )
            )
        self.staging.through(flat.dtype, turns)
        return out

    def _reduce_scatter(self, flat: Array, counts: list[int]) -> Array:
        self._start_reductions()
        if _on_host(flat):
            return self.inner._reduce_scatter(flat, counts)
        out = self.device.xp.empty(counts[self.rank], flat.dtype)
        turns, start = [], 0
        for parts in slices(_cut(flat, counts)):
            sizes, places = _layout(parts)
            mine = out[start : start + sizes[self.rank]]
            start += mine.size

            def move(host: np.ndarray, sizes: list[int] = sizes) -> None:
                host[: sizes[self.rank]] = self.inner._reduce_scatter(host, sizes)

            turns.append(Turn(sum(sizes), places, move, [(0, mine)]))
        self.staging.through(flat.dtype, turns)
        return out

    def _broadcast(self, flat: Array, root: int) -> None:
        self._start_reductions()
        if _on_host(flat):
            return self.inner._broadcast(flat, root)
        turns = []
        for part in pieces(flat):
            down, up = ([(0, part)], []) if self.rank == root else ([], [(0, part)])
            turns.append(Turn(part.size, down, lambda host: self.inner._broadcast(host, root), up))
        self.staging.through(flat.dtype, turns)

    # ---- messages: all chunks at once, each in memory of its own

    def _chunks(self, flat: Array) -> list[tuple[Array, np.ndarray]]:
        """The pieces of an array, each with bytes of pinned memory."""
        return [(part, self.staging.pinned(part.nbytes)) for part in pieces(flat)]

    def _isend(self, flat: Array, dest: int, tag: int) -> Work:
        if _on_host(flat):
            return self.inner._isend(flat, dest, tag)
        coming = [
            (host, self.staging.start_download(part, host)) for part, host in self._chunks(flat)
        ]
        works = []
        for host, down in coming:
            down.synchronize()
            works.append(self.inner._isend(host.view(flat.dtype), dest, tag))
        return AllWork(works)

    def _irecv(self, flat: Array, source: int, tag: int) -> Work:
        if _on_host(flat):
            return self.inner._irecv(flat, source, tag)
        return AllWork(
            [self._receive(part, host, source, tag) for part, host in self._chunks(flat)]
        )

    def _receive(self, part: Array, host: np.ndarray, source: int, tag: int) -> Work:
        return _Then(
            self.inner._irecv(host.view(part.dtype), source, tag),
            part,
            lambda: self.staging.upload(host, part),
        )

    def _recv_any(self, flat: Array, tag: int) -> int:
        if _on_host(flat):
            return self.inner._recv_any(flat, tag)
        (first, host), *rest = self._chunks(flat)
        source = self.inner._recv_any(host.view(flat.dtype), tag)
        self.staging.upload(host, first)
        AllWork([self._receive(part, host, source, tag) for part, host in rest]).wait()
        return source


class DirectCommunicator(_DeviceCommunicator):
    """Device arrays by their addresses, for an MPI library that takes those. Nothing here reads
    them on the host."""

    def _address(self, flat: Array) -> np.ndarray:
        """A NumPy array over device memory, to be handed to MPI and to nobody else. The device has
        done all that writes it."""
        if _on_host(flat) or not flat.size:
            return flat if _on_host(flat) else np.empty(0, flat.dtype)
        self.device.synchronize()
        memory = (ctypes.c_uint8 * flat.nbytes).from_address(flat.data.ptr)
        return np.frombuffer(memory, np.uint8).view(flat.dtype)

    def _all_reduce(self, flat: Array, op: ReduceOp) -> None:
        if not _on_host(flat) and (is_narrow(flat.dtype) or flat.dtype.kind == "b"):
            self._reduce_slices(flat, op)
        else:
            self.inner._all_reduce(self._address(flat), op)

    def _iall_reduce(self, flat: Array, op: ReduceOp) -> Work:
        if not _on_host(flat) and (is_narrow(flat.dtype) or flat.dtype.kind == "b"):
            self._reduce_slices(flat, op)
            return DoneWork()
        return _Then(self.inner._iall_reduce(self._address(flat), op), flat)

    def _reduce_slices(self, flat: Array, op: ReduceOp) -> None:
        """All-reduce by exchanging slices, adding in rank order on the device, and gathering."""
        counts = [
            flat.size * (r + 1) // self.size - flat.size * r // self.size for r in range(self.size)
        ]
        mine = self._all_to_all(_cut(flat, counts), [counts[self.rank]] * self.size)
        flat[...] = self._all_gather(reduce_in_order(mine, op), counts)

    def _all_gather(self, flat: Array, counts: list[int]) -> Array:
        if _on_host(flat):
            return self.inner._all_gather(flat, counts)
        out = self.device.xp.empty(sum(counts), flat.dtype)
        first = sum(counts[: self.rank])
        out[first : first + counts[self.rank]] = flat
        self.inner._gather_into(self._address(out), counts)
        return out

    def _reduce_scatter(self, flat: Array, counts: list[int]) -> Array:
        if _on_host(flat):
            return self.inner._reduce_scatter(flat, counts)
        return reduce_in_order(
            self._all_to_all(_cut(flat, counts), [counts[self.rank]] * self.size), SUM
        )

    def _broadcast(self, flat: Array, root: int) -> None:
        self.inner._broadcast(self._address(flat), root)

    def _isend(self, flat: Array, dest: int, tag: int) -> Work:
        return _Then(self.inner._isend(self._address(flat), dest, tag), flat)

    def _irecv(self, flat: Array, source: int, tag: int) -> Work:
        return _Then(self.inner._irecv(self._address(flat), source, tag), flat)

    def _recv_any(self, flat: Array, tag: int) -> int:
        return self.inner._recv_any(self._address(flat), tag)


def _cut(flat: Array, counts: list[int]) -> list[Array]:
    """Slices of these lengths, one after another."""
    ends = np.cumsum(counts)
    return [flat[int(end) - count : int(end)] for end, count in zip(ends, counts, strict=True)]


def _layout(parts: list[Array]) -> tuple[list[int], list[tuple[int, Array]]]:
    """Sizes of arrays, and where each stands if they lie one after another."""
    sizes = [part.size for part in parts]
    starts = [int(end) - size for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
    return sizes, list(zip(starts, parts, strict=True))
