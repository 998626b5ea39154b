"""Ranks as MPI processes, through mpi4py's buffer interface; nothing is pickled.

MPI counts are 32-bit in many libraries and some fail on large messages (users report it), so
everything is cut into chunks below 1 GiB. Sums of 2-byte floats, which no MPI library knows, are
exchanged by slices, summed in rank order in float32 and rounded once.

Waiting: small collectives block inside MPI, which spins and is fastest. Receives, barriers and
non-blocking operations may wait long for another rank's computation, so they poll: for about 5 ms
giving up the core between polls, so that a rank with work goes first and the many steps of a large
reduction follow one another at once, then sleeping.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from minillm.base.arrays import is_narrow
from minillm.base.errors import CommError, CommTimeout
from minillm.comm.base import BaseCommunicator, reduce_in_order
from minillm.comm.communicator import (
    DEFAULT_TIMEOUT,
    MAX_TAG,
    Communicator,
    ReduceOp,
    SharedWindow,
    Work,
)
from minillm.comm.ledger import ledger
from minillm.comm.single import SelfCommunicator

CHUNK_BYTES: ContextVar[int] = ContextVar("chunk_bytes", default=1 << 30)
"""Largest message handed to MPI; tests make it tiny."""

SPIN_SECONDS = 5e-3
SLEEP_SECONDS = (50e-6, 500e-6)
BLOCKING_BYTES = 64 << 10  # collectives up to this size block inside MPI

_OPS = {ReduceOp.SUM: MPI.SUM, ReduceOp.MAX: MPI.MAX, ReduceOp.MIN: MPI.MIN}


def _chunks(flat: np.ndarray) -> list[np.ndarray]:
    """Contiguous pieces of at most CHUNK_BYTES; one empty piece for an empty array, since no
    message is skipped."""
    step = max(1, CHUNK_BYTES.get() // flat.itemsize)
    return [flat[i : i + step] for i in range(0, flat.size, step)] or [flat]


def _bytes(flat: np.ndarray) -> np.ndarray:
    """The same memory as bytes: for dtypes that MPI does not know, and for moves that do not
    compute."""
    return flat.view(np.uint8)


class _Requests:
    """A Work over MPI requests. Keeps the buffers alive; polls, then sleeps; names what it waits
    for when time is up."""

    def __init__(
        self,
        requests: Sequence[MPI.Request],
        keep: Any,
        what: str,
        timeout: float,
        then: Callable[[], None] | None = None,
    ) -> None:
        self._requests, self._keep, self._what, self._timeout, self._then = (
            list(requests),
            keep,
            what,
            timeout,
            then,
        )

    def test(self) -> bool:
        """See `Work`."""
        if self._requests and MPI.Request.Testall(self._requests):
            self._requests = []
            if self._then is not None:
                self._then()
            self._keep = None
        return not self._requests

    def wait(self) -> None:
        """See `Work`."""
        started, sleep = time.monotonic(), SLEEP_SECONDS[0]
        while not self.test():
            waited = time.monotonic() - started
            if waited < SPIN_SECONDS:
                os.sched_yield()
                continue
            if waited > self._timeout:
                raise CommTimeout(
                    f"waited {self._timeout:g} s for {self._what}; last operations "
                    f"here:\n{ledger().recent()}"
                )
            time.sleep(sleep)
            sleep = min(SLEEP_SECONDS[1], sleep * 1.5)


class MPICommunicator(BaseCommunicator):
    """A group of MPI processes."""

    def __init__(
        self, comm: MPI.Comm, name: str = "world", timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), name, timeout)
        self.mpi = comm
        self.intra = comm if isinstance(comm, MPI.Intracomm) else MPI.COMM_SELF

    # ---- collectives

    def _all_reduce(self, flat: np.ndarray, op: ReduceOp) -> None:
        if is_narrow(flat.dtype) or flat.dtype.kind == "b":
            self._reduce_slices(flat, op)
        elif flat.nbytes <= min(BLOCKING_BYTES, CHUNK_BYTES.get()):
            self.mpi.Allreduce(MPI.IN_PLACE, flat, _OPS[op])
        else:
            self._iall_reduce(flat, op).wait()

    def _iall_reduce(self, flat: np.ndarray, op: ReduceOp) -> Work:
        if is_narrow(flat.dtype) or flat.dtype.kind == "b":
            self._reduce_slices(flat, op)
            return self._work([], flat, "all_reduce")
        requests = [self.mpi.Iallreduce(MPI.IN_PLACE, chunk, _OPS[op]) for chunk in _chunks(flat)]
        return self._work(requests, flat, f"an all_reduce of {flat.nbytes} bytes")

    def _reduce_slices(self, flat: np.ndarray, op: ReduceOp) -> None:
        """All-reduce by exchanging slices, reducing in rank order, and gathering: one rounding, the
        same bits everywhere."""
        counts = [
            flat.size * (r + 1) // self.size - flat.size * r // self.size for r in range(self.size)
        ]
        parts = np.split(flat, np.cumsum(counts)[:-1])
        mine = self._all_to_all(parts, [counts[self.rank]] * self.size)
        flat[...] = self._all_gather(reduce_in_order(mine, op), counts)

    def _all_gather(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        out = np.empty(sum(counts), flat.dtype)
        first = sum(counts[: self.rank])
        out[first : first + counts[self.rank]] = flat
        self._gather_into(out, counts)
        return out

    def _gather_into(self, out: np.ndarray, counts: list[int]) -> None:
        """Fill `out`, in which this rank's own part stands already, with everybody's. Reads and
        writes it by MPI alone."""
        if out.nbytes <= CHUNK_BYTES.get():
            self.mpi.Allgatherv(
                MPI.IN_PLACE, [_bytes(out), [count * out.itemsize for count in counts]]
            )
            return
        ends = np.cumsum(counts)
        for root in range(self.size):
            self._broadcast(out[ends[root] - counts[root] : ends[root]], root)

    def _reduce_scatter(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        if flat.nbytes <= CHUNK_BYTES.get() and not is_narrow(flat.dtype):
            out = np.empty(counts[self.rank], flat.dtype)
            self.mpi.Reduce_scatter(flat, out, counts, MPI.SUM)
            return out
        parts = np.split(flat, np.cumsum(counts)[:-1])
        return reduce_in_order(
            self._all_to_all(parts, [counts[self.rank]] * self.size), ReduceOp.SUM
        )

    def _all_to_all(self, parts: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        """Pairwise messages, so that each can be chunked and of any size."""
        received = [np.empty(count, part.dtype) for count, part in zip(counts, parts, strict=True)]
        received[self.rank][...] = parts[self.rank]
        others = [r for r in range(self.size) if r != self.rank]
        waiting = [self._irecv(received[r], r, MAX_TAG) for r in others] + [
            self._isend(parts[r], r, MAX_TAG) for r in others
        ]
        for work in waiting:
            work.wait()
        return received

    def _broadcast(self, flat: np.ndarray, root: int) -> None:
        requests = [self.mpi.Ibcast(_bytes(chunk), root) for chunk in _chunks(flat)]
        self._work(requests, flat, f"a broadcast from rank {root}").wait()

    def _barrier(self) -> None:
        self._work([self.mpi.Ibarrier()], None, "a barrier").wait()

    # ---- messages

    def _isend(self, flat: np.ndarray, dest: int, tag: int) -> Work:
        requests = [self.mpi.Isend(_bytes(chunk), dest, tag) for chunk in _chunks(flat)]
        return self._work(
            requests,
            flat,
            f"rank {dest} of {self.name!r} to receive {flat.nbytes} bytes, tag {tag}",
        )

    def _irecv(self, flat: np.ndarray, source: int, tag: int) -> Work:
        what = f"{flat.nbytes} bytes from rank {source} of {self.name!r}, tag {tag}"
        requests = [self.mpi.Irecv(_bytes(chunk), source, tag) for chunk in _chunks(flat)]
        return self._work(requests, flat, what)

    def _recv_any(self, flat: np.ndarray, tag: int) -> int:
        status = MPI.Status()
        started = time.monotonic()
        while not self.mpi.Iprobe(MPI.ANY_SOURCE, tag, status):
            if time.monotonic() - started > self.timeout:
                raise CommTimeout(
                    f"waited {self.timeout:g} s for any message with tag {tag}; last operations "
                    f"here:\n{ledger().recent()}"
                )
            time.sleep(SLEEP_SECONDS[0])
        self._irecv(flat, status.Get_source(), tag).wait()
        return status.Get_source()

    def _work(self, requests: Sequence[MPI.Request], keep: Any, what: str) -> _Requests:
        return _Requests(requests, keep, what, self.timeout)

    # ---- groups and shared memory

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        """A group of the ranks with the same `color`, ordered by (key, rank); None where the color
        is None. Collective."""
        made = self.mpi.Split(
            MPI.UNDEFINED if color is None else color, self.rank if key is None else key
        )
        return None if made == MPI.COMM_NULL else _wrap(made, name or self.name, self.timeout)

    def split_by_node(self) -> Communicator:
        """The ranks of this group that share memory with this one. Collective."""
        return _wrap(self.mpi.Split_type(MPI.COMM_TYPE_SHARED), "node", self.timeout)

    def dup(self, name: str) -> Communicator:
        """The same ranks under another name, with messages of their own. Collective."""
        return MPICommunicator(self.mpi.Dup(), name, self.timeout)

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        """Memory that every rank of the group sees. Collective; all ranks must be on one node."""
        node = self.mpi.Split_type(MPI.COMM_TYPE_SHARED)
        if node.Get_size() != self.size:
            raise CommError(
                f"the {self.size} ranks of {self.name!r} lie on several nodes and cannot share "
                "memory; use split_by_node()"
            )
        return _MPIWindow(self, nbytes)


class _MPIWindow:
    """An MPI shared-memory window; each rank's part starts on a cache line."""

    def __init__(self, comm: MPICommunicator, nbytes: int) -> None:
        self._comm = comm
        self._window = MPI.Win.Allocate_shared(nbytes + 64, 1, comm=comm.intra)
        self._window.Lock_all()
        sizes = comm._all_gather(np.array([nbytes], np.int64), [1] * comm.size)
        self.parts = [self._part(rank, int(size)) for rank, size in enumerate(sizes)]
        self.parts[comm.rank][...] = 0
        self.sync()

    def _part(self, rank: int, nbytes: int) -> np.ndarray:
        memory, _ = self._window.Shared_query(rank)
        raw = np.asarray(memory).view(np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + nbytes]

    def sync(self) -> None:
        """See `SharedWindow`."""
        self._window.Sync()
        self._comm.barrier()
        self._window.Sync()

    def free(self) -> None:
        """See `SharedWindow`."""
        self.parts = []
        self._window.Unlock_all()
        self._window.Free()


def _wrap(comm: MPI.Comm, name: str, timeout: float) -> Communicator:
    return (
        SelfCommunicator(name, timeout)
        if comm.Get_size() == 1
        else MPICommunicator(comm, name, timeout)
    )


def takes_device_memory() -> bool:
    """Whether the MPI library says that it reads and writes a GPU's memory. A trial with a device
    pointer would end the process where it does not."""
    try:
        loaded = {
            line.split()[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if re.search(r"/libmpi\S*\.so", line)
        }
    except OSError:
        return False
    for name in sorted(loaded):
        query = getattr(ctypes.CDLL(name), "MPIX_Query_cuda_support", None)
        if query is not None:
            return bool(query())
    return False


@contextmanager
def chunk_limit(num_bytes: int) -> Any:
    """Cut messages into chunks of at most `num_bytes` inside the block."""
    token = CHUNK_BYTES.set(num_bytes)
    try:
        yield
    finally:
        CHUNK_BYTES.reset(token)
