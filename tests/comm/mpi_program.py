"""Run by test_mpi.py under mpirun: one check a function, chosen by name; `all` runs the collective
checks."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from minillm.base.errors import CommTimeout, ConfigError
from minillm.comm.agreement import agree
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.ledger import ledger
from minillm.comm.process import main_guard, world


def collectives(comm: Communicator) -> None:
    """Every collective against NumPy, in several dtypes."""
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
    """Shards of different lengths, none among them, and arrays that are not contiguous."""
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
    """A sum has the same bits on every rank, small or large, blocking or not."""
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
    """Everything again with messages of at most 64 bytes."""
    from minillm.comm import mpi

    before, mpi.MAX_MESSAGE_BYTES = mpi.MAX_MESSAGE_BYTES, 64
    collectives(comm)
    uneven(comm)
    mpi.MAX_MESSAGE_BYTES = before


def shared(comm: Communicator) -> None:
    """A window that all ranks of the node see."""
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
    """Splits have their own ranks and ledger rows."""
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
    """A receive that nobody answers ends with the last operations on the screen."""
    comm.timeout = 0.5
    try:
        comm.recv(np.empty(3), (comm.rank + 1) % comm.size, 7)
    except CommTimeout as error:
        assert "tag 7" in str(error)
        comm.timeout = 60
        return
    raise AssertionError("the receive should have timed out")


def raises(comm: Communicator) -> None:
    """One rank fails; the others wait for it."""
    if comm.rank == 1:
        raise ValueError("planted failure")
    comm.barrier()


def killed(comm: Communicator) -> None:
    """One rank dies without a word."""
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.recv(np.empty(3), 1)


def bad_option(comm: Communicator) -> None:
    """An error that only one rank sees, agreed on by all."""

    def check() -> None:
        if comm.rank == 1:
            raise ConfigError("the planted option is wrong; choose another")

    agree(comm, check)


COLLECTIVES = (collectives, uneven, identical_bits, chunked, shared, groups, time_out)


def main() -> int:
    comm = world()
    assert comm.size == int(sys.argv[2]), (comm.size, sys.argv)
    checks = COLLECTIVES if sys.argv[1] == "all" else (globals()[sys.argv[1]],)
    for check in checks:
        check(comm)
        comm.barrier()
    if comm.rank == 0:
        print("passed", len(checks))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
