"""Arrays on GPUs between ranks: a `Communicator` around another one, which moves host memory.

If MPI takes device memory, it gets the device's addresses. Otherwise arrays travel through pinned
host memory, chunk by chunk (staging.py). A bucket of gradients, reduced in the background, is one
chunk. Nothing is sent before the device has written it. The host waits for that, or, for a
background reduction, tests it at every poll and meanwhile queues more work. Sums of 2-byte floats
are exchanged by slices, added in rank order in float32 and rounded once, as among hosts. Host
arrays pass through unchanged.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from minillm.base.arrays import Array, is_narrow
from minillm.base.device import CPU, Device
from minillm.comm.buffers import SUM, ReduceOp, cut, reduce_in_order
from minillm.comm.communicator import Communicator
from minillm.comm.staging import Staging, Turn, pieces, slices
from minillm.comm.work import AllWork, DoneWork, SharedWindow, ThenWork, Work


def on_device(comm: Communicator, device: Device, direct: bool | None = None) -> Communicator:
    """Wrap `comm` so that it also accepts arrays on `device`.

    `direct`: the transport takes device memory (None: as the MPI library says).
    """
    if device is CPU or comm.size == 1:
        return comm
    if direct is None:
        from minillm.comm.mpi import takes_device_memory

        direct = takes_device_memory()
    return DirectCommunicator(comm, device) if direct else StagedCommunicator(comm, device)


def _on_host(x: Array) -> bool:
    return isinstance(x, np.ndarray)


class _DeviceCommunicator(Communicator):
    """Common part of both wrappers: groups, barriers and background reductions."""

    def __init__(self, inner: Communicator, device: Device) -> None:
        super().__init__(inner.rank, inner.size, inner.name, inner.timeout)
        self.inner = inner
        self.device = device

    def working(self, what: str) -> AbstractContextManager[None]:
        return self.inner.working(what)

    def _wrap(self, made: Any) -> Any:
        return made if made is None or made.size == 1 else self._around(made)

    def _around(self, made: Any) -> Communicator:
        return type(self)(made, self.device)

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        self._start_reductions()
        return self._wrap(self.inner.split(color, key, name))

    def split_by_node(self) -> Communicator:
        self._start_reductions()
        return self._wrap(self.inner.split_by_node())

    def dup(self, name: str) -> Communicator:
        self._start_reductions()
        return self._wrap(self.inner.dup(name))

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        self._start_reductions()
        return self.inner.alloc_shared(nbytes)

    def _barrier(self) -> None:
        self._start_reductions()
        self.inner._barrier()

    def _iprobe(self, tag: int) -> int | None:
        return self.inner._iprobe(tag)

    def _start_reductions(self, wait: bool = True) -> None:
        """Start the reductions that wait for the device; here there are none."""

    def _all_to_all(self, parts: list[Array], counts: list[int]) -> list[Array]:
        self._start_reductions()
        if _on_host(parts[0]):
            return self.inner._all_to_all(parts, counts)
        return super()._all_to_all(parts, counts)


class _Reduction:
    """Background reduction of a device array, which is downloaded first.

    The reductions of a group start in their order, because all ranks run the same collectives in
    the same order.
    """

    def __init__(self, comm: StagedCommunicator, flat: Array, op: ReduceOp) -> None:
        self._comm, self._flat, self._op = comm, flat, op
        self._host = comm.staging.pinned(flat.nbytes)
        self.down = comm.staging.start_download(flat, self._host)
        self._work: Work | None = None
        self._done = False

    def start(self) -> None:
        """Launch the reduction of the downloaded array."""
        self._work = self._comm.inner._iall_reduce(self._host.view(self._flat.dtype), self._op)

    def test(self) -> bool:
        """Start reductions whose download is done; return True once this one is done."""
        self._comm._start_reductions(wait=False)
        if not self._done and self._work is not None and self._work.test():
            self._finish()
        return self._done

    def wait(self) -> None:
        """Start all pending reductions and block until this one is done."""
        self._comm._start_reductions(wait=True)
        if not self._done:
            assert self._work is not None
            self._work.wait()
            self._finish()

    def _finish(self) -> None:
        self._comm.staging.upload(self._host, self._flat)
        self._done = True


class StagedCommunicator(_DeviceCommunicator):
    """Device arrays by way of pinned host memory.

    Groups share that memory with the communicator that they were made from.
    """

    def __init__(self, inner: Communicator, device: Device, staging: Staging | None = None) -> None:
        super().__init__(inner, device)
        self.staging = staging or Staging(device)
        self._coming: deque[_Reduction] = deque()

    def _around(self, made: Any) -> Communicator:
        return StagedCommunicator(made, self.device, self.staging)

    def _start_reductions(self, wait: bool = True) -> None:
        """Start the background reductions whose download is done.

        With `wait` all of them start: they precede every other collective of this group.
        """
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
        if is_narrow(flat.dtype) or flat.dtype.kind == "b":
            # the transport reduces these by blocking messages, which a poll must not do
            self._all_reduce(flat, op)
            return DoneWork()
        self._coming.append(_Reduction(self, flat, op))
        return self._coming[-1]

    def _all_gather(self, flat: Array, counts: list[int]) -> Array:
        self._start_reductions()
        if _on_host(flat):
            return self.inner._all_gather(flat, counts)
        out = self.device.xp.empty(sum(counts), flat.dtype)
        shards = cut(out, counts)
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
        for parts in slices(cut(flat, counts)):
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

    # ---- messages: all chunks at once, each in its own memory

    def _chunks(self, flat: Array) -> list[tuple[Array, np.ndarray]]:
        """Return the pieces of an array, each with bytes of pinned memory."""
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
        return ThenWork(
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
    """Device arrays by their addresses, for an MPI library that takes those.

    Nothing here reads them on the host.
    """

    def _address(self, flat: Array) -> np.ndarray:
        """Return a NumPy array over device memory, which only MPI may read or write.

        Waits until the device has finished all its queued work.
        """
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
        return ThenWork(self.inner._iall_reduce(self._address(flat), op), flat)

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
            self._all_to_all(cut(flat, counts), [counts[self.rank]] * self.size), SUM
        )

    def _broadcast(self, flat: Array, root: int) -> None:
        self.inner._broadcast(self._address(flat), root)

    def _isend(self, flat: Array, dest: int, tag: int) -> Work:
        return ThenWork(self.inner._isend(self._address(flat), dest, tag), flat)

    def _irecv(self, flat: Array, source: int, tag: int) -> Work:
        return ThenWork(self.inner._irecv(self._address(flat), source, tag), flat)

    def _recv_any(self, flat: Array, tag: int) -> int:
        return self.inner._recv_any(self._address(flat), tag)


def _layout(parts: list[Array]) -> tuple[list[int], list[tuple[int, Array]]]:
    """Return the sizes of arrays, and each array with its start if they lie consecutively."""
    sizes = [part.size for part in parts]
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    return sizes, list(zip(starts, parts, strict=True))
