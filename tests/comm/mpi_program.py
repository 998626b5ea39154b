"""Program of test_mpi.py under mpirun: each function is one check, chosen by name.

`all` runs the checks of COLLECTIVES, and `waits` those of WAITS.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from minillm.base.errors import CommTimeout, ConfigError, PeerFailed
from minillm.comm.agreement import agree, known_to_all
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.ledger import ledger, recording
from minillm.comm.process import main_guard, world


def collectives(comm: Communicator) -> None:
    """Compare every collective with NumPy, in several dtypes."""
    import ml_dtypes

    n, r = comm.size, comm.rank
    for dtype in (np.float32, np.float64, np.int64, np.uint8, ml_dtypes.bfloat16):
        parts = [np.arange(6).reshape(2, 3).astype(dtype) + dtype(rank) for rank in range(n)]
        x = parts[r].copy()
        comm.all_reduce_(x)
        assert np.array_equal(x.astype(float), sum(p.astype(float) for p in parts)), dtype
        y = parts[r].copy()
        work = comm.iall_reduce_(y)
        while not work.test():
            time.sleep(1e-5)
        assert np.array_equal(x, y)
        for dim in (0, 1):
            assert np.array_equal(comm.all_gather(parts[r], dim), np.concatenate(parts, dim))
        wide = np.concatenate(parts, 1)
        assert np.array_equal(
            comm.reduce_scatter(wide, 1).astype(float), n * parts[r].astype(float)
        )
        got = comm.all_to_all([parts[r] + dtype(10 * d) for d in range(n)])
        assert all(np.array_equal(g, parts[s] + dtype(10 * r)) for s, g in enumerate(got))
        z = parts[r].copy()
        comm.broadcast_(z, n - 1)
        assert np.array_equal(z, parts[n - 1])
        out = np.empty_like(parts[0])
        comm.sendrecv(parts[r], (r + 1) % n, out, (r - 1) % n, 3)
        assert np.array_equal(out, parts[(r - 1) % n])
    assert float(comm.all_reduce_(np.array([float(r)]), MAX)[0]) == n - 1
    assert comm.gather_json({"rank": r}) == [{"rank": i} for i in range(n)]
    assert comm.broadcast_json([r, "ä"], 1) == [1, "ä"]


def uneven(comm: Communicator) -> None:
    """Check shards of different lengths, empty ones, and arrays that are not contiguous."""
    n, r = comm.size, comm.rank
    sizes = [(3 * i) % 4 for i in range(n)]
    shards = [
        np.random.default_rng(i).standard_normal((2, size, 3)) for i, size in enumerate(sizes)
    ]
    whole = np.concatenate(shards, 1)
    assert np.array_equal(comm.all_gather(shards[r], 1, sizes), whole)
    assert np.allclose(comm.reduce_scatter(whole, 1, sizes), n * shards[r])
    strided = np.arange(40.0).reshape(5, 8)[:, ::2] * (r + 1)
    comm.all_reduce_(strided)
    assert np.array_equal(strided, np.arange(40.0).reshape(5, 8)[:, ::2] * n * (n + 1) / 2)
    empty = comm.all_reduce_(np.empty((0, 4)))
    assert empty.shape == (0, 4)


def identical_bits(comm: Communicator) -> None:
    """Compare the bits of sums on all ranks, small and large, blocking and not."""
    for size in (3, 1000, 300_000):
        x = np.random.default_rng(comm.rank).standard_normal(size).astype(np.float32)
        y = x.copy()
        comm.all_reduce_(x)
        comm.iall_reduce_(y).wait()
        for result in (x, y):
            root = result.copy()
            comm.broadcast_(root)
            assert np.array_equal(root, result), (
                f"rank {comm.rank} differs from rank 0 at size {size}"
            )


def chunked(comm: Communicator) -> None:
    """Repeat the checks with messages of at most 64 bytes."""
    from minillm.comm import mpi

    before, mpi.MAX_MESSAGE_BYTES = mpi.MAX_MESSAGE_BYTES, 64
    collectives(comm)
    uneven(comm)
    mpi.MAX_MESSAGE_BYTES = before


def shared(comm: Communicator) -> None:
    """Check a window that all ranks of the node address."""
    window = comm.alloc_shared(100)
    window.parts[comm.rank][:] = comm.rank + 1
    window.sync()
    assert all(
        (part == rank + 1).all() and part.size == 100 for rank, part in enumerate(window.parts)
    )
    assert window.parts[0].ctypes.data % 64 == 0
    window.sync()
    window.free()


def groups(comm: Communicator) -> None:
    """Check the ranks and the ledger rows of split groups."""
    half = comm.split(comm.rank % 2, -comm.rank, "half")
    assert half is not None and half.gather_json(comm.rank) == sorted(
        (r for r in range(comm.size) if r % 2 == comm.rank % 2), reverse=True
    )
    assert comm.split(None) is None
    before = ledger().payload().get(("half", "all_reduce"), 0)
    half.all_reduce_(np.zeros(10))
    assert ledger().payload().get(("half", "all_reduce"), 0) - before == (
        80 if half.size > 1 else 0
    )


def time_out(comm: Communicator) -> None:
    """Check that a receive without a sender times out and names itself."""
    comm.timeout = 0.5
    try:
        comm.recv(np.empty(3), (comm.rank + 1) % comm.size, 7)
    except CommTimeout as error:
        assert "tag 7" in str(error) and re.search(r"24 bytes, \S+: not fin", str(error)), str(
            error
        )
        comm.timeout = 60
        return
    raise AssertionError("the receive should have timed out")


def working(comm: Communicator) -> None:
    """Check that the work of one rank for three time-outs ends no wait, polled or blocking."""
    comm.timeout = 0.6
    for wait in (comm.barrier, lambda: comm.gather_json(0)):
        if comm.rank == comm.size - 1:
            with comm.working("reading"):
                time.sleep(1.8)
        wait()
    agree(comm, lambda: time.sleep(1.8 if comm.rank == 0 else 0))
    comm.timeout = 60


def paused(comm: Communicator) -> None:
    """Check that a pause of all ranks for two time-outs, here by SIGSTOP, ends no wait."""
    comm.timeout, started = 1.5, time.monotonic()
    pids = " ".join(map(str, comm.gather_json(os.getpid())))
    if comm.rank == 0:  # the others wait for it in the barrier
        script = f"sleep 0.2; kill -STOP {pids}; sleep 3; kill -CONT {pids}"
        subprocess.run(["sh", "-c", script], check=True)
    comm.barrier()
    assert time.monotonic() - started > 3
    comm.timeout = 60


def peer_failure(comm: Communicator) -> None:
    """Check that an error of MPI inside a wait means that a rank has ended, unless it is a bug."""
    from mpi4py import MPI

    from minillm.comm.mpi import MPICommunicator

    assert isinstance(comm, MPICommunicator)
    for code, expected in ((MPI.ERR_OTHER, PeerFailed), (MPI.ERR_TRUNCATE, MPI.Exception)):
        try:
            with comm.waiting("a planted call"):
                raise MPI.Exception(code)
        except expected as error:
            assert "another rank has ended" in str(error) or expected is MPI.Exception


def stopped(comm: Communicator) -> None:
    """Stop one rank while the others block in a small reduction."""
    comm.timeout = 1.0
    if comm.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.reduce_numbers([1.0])


def late(comm: Communicator) -> None:
    """Keep one rank busy while the others block in a gather."""
    comm.timeout = 1.0
    if comm.rank == 1:
        dawdle()
    comm.gather_json(0)


def dawdle() -> None:
    time.sleep(600)


def alone(comm: Communicator) -> None:
    """Raise an error that no other rank has, as if all knew of it."""
    with known_to_all():
        if comm.rank == 1:
            raise ConfigError("only this rank sees the planted fault")
    comm.barrier()


def raises(comm: Communicator) -> None:
    """Fail on one rank while the others wait for it."""
    if comm.rank == 1:
        raise ValueError("planted failure")
    comm.barrier()


def chatty(comm: Communicator) -> None:
    """End while signals of the watchdogs are under way."""
    comm.barrier()
    for _ in range(20):
        comm._watchdog._send_all({"working": True})  # type: ignore[attr-defined]


def again(comm: Communicator) -> None:
    """Start twice more in this process, as several programs in a row do."""
    chatty(comm)
    for _ in range(2):
        chatty(world())
    found = [thread.name for thread in threading.enumerate()]
    assert found.count("watchdog") == 1, found


def killed(comm: Communicator) -> None:
    """Kill one rank while the others wait for it."""
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.recv(np.empty(3), 1)


def bad_option(comm: Communicator) -> None:
    """Agree on an error that only one rank sees."""

    def check() -> None:
        if comm.rank == 1:
            raise ConfigError("the planted option is wrong; choose another")

    agree(comm, check)


def different(comm: Communicator) -> None:
    """Call different collectives under --check-order."""
    x = np.ones(3, np.float32)
    with recording(check_order=True):
        comm.barrier()
        if comm.rank:
            comm.all_reduce_(x)
        else:
            comm.all_gather(x)


COLLECTIVES = (collectives, uneven, identical_bits, chunked, shared, groups)
WAITS = (time_out, working, paused, peer_failure)


def main() -> int:
    comm = world()
    assert comm.size == int(sys.argv[2]), (comm.size, sys.argv)
    several = {"all": COLLECTIVES, "waits": WAITS}
    checks = several.get(sys.argv[1]) or (globals()[sys.argv[1]],)
    for check in checks:
        check(comm)
        comm.barrier()
    if comm.rank == 0:
        print("passed", len(checks))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
