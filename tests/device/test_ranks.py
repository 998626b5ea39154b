"""Device arrays between ranks: every operation of the communicators.

The tests run on the stand-in, with thread ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from standin.cuda import Event
from standin.install import installed

from minillm.base.arrays import to_host
from minillm.base.device import CPU, open_device
from minillm.comm import staging
from minillm.comm.buffers import reduce_in_order
from minillm.comm.communicator import MAX, SUM, Communicator
from minillm.comm.device_arrays import DirectCommunicator, StagedCommunicator, on_device
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.comm.work import DoneWork, Work

RANKS = 3
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "float64": np.float64,
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(staging, "STAGING_BYTES", 64)  # several chunks in the smallest array
    with installed() as module:
        yield module


def values(rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    x = np.random.default_rng(rank).standard_normal(shape) * 100
    return x.astype(DTYPES[dtype])


def everywhere(fn: Callable[[Communicator, Any], Any], direct: bool) -> list[Any]:
    """Call fn(comm, upload) on every rank and return the results."""

    def rank(comm: Communicator) -> Any:
        device = open_device("cuda")
        return fn(on_device(comm, device, direct), device.upload)

    return run_ranks(RANKS, rank, timeout=20)


@pytest.mark.parametrize("direct", [False, True], ids=["staged", "direct"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (0, 4), (200,)])
def test_collectives_equal_those_of_the_host(
    shape: tuple[int, ...], dtype: str, direct: bool
) -> None:
    parts = [values(r, shape, dtype) for r in range(RANKS)]

    def rank(comm: Communicator, upload: Any) -> Any:
        own, found = parts[comm.rank], {}
        found["sum"] = comm.all_reduce_(upload(own))
        found["max"] = comm.all_reduce_(upload(own), MAX)
        later = upload(own)
        work = comm.iall_reduce_(later)
        found["gather"] = comm.all_gather(upload(own), len(shape) - 1)
        work.wait()
        assert work.test()
        found["later"] = later
        found["scatter"] = comm.reduce_scatter(upload(np.concatenate([own] * RANKS)), 0)
        found["exchange"] = comm.all_to_all([upload(own)] * RANKS)[1]
        found["broadcast"] = comm.broadcast_(upload(own), 2)
        source, target = (comm.rank - 1) % RANKS, (comm.rank + 1) % RANKS
        found["ring"] = comm.sendrecv(
            upload(own), target, upload(np.zeros_like(own)), source, tag=3
        )
        comm.send(upload(own), target, tag=4)
        found["any"] = upload(np.zeros_like(own))
        assert comm.recv_any(found["any"], tag=4) == source
        comm.barrier()
        host = comm.all_reduce_(np.ones(3))
        assert isinstance(host, np.ndarray) and (host == RANKS).all()
        assert comm.gather_json(comm.rank) == list(range(RANKS))
        return {name: to_host(x) for name, x in found.items()}, ledger().payload()

    everyone = everywhere(rank, direct)
    total = reduce_in_order(parts, SUM)
    for r, (found, payload) in enumerate(everyone):
        before = parts[(r - 1) % RANKS]
        want = {
            "sum": total,
            "later": total,
            "max": reduce_in_order(parts, MAX),
            "gather": np.concatenate(parts, -1),
        }
        want |= {
            "scatter": total,
            "exchange": parts[1],
            "broadcast": parts[2],
            "ring": before,
            "any": before,
        }
        for name, x in want.items():
            assert (
                found[name].dtype == x.dtype
                and found[name].tobytes() == np.ascontiguousarray(x).tobytes()
            ), name
        assert payload == everyone[0][1]


def test_narrow_sums_are_rounded_once() -> None:
    """Check that a bfloat16 sum is rounded once.

    1 + 2^-8 + 2^-8 is 1 + 2^-7, but 1 where each partial sum is rounded.
    """
    parts = [np.full(100, x, ml_dtypes.bfloat16) for x in (1.0, 2.0**-8, 2.0**-8)]
    for direct in (False, True):
        found = everywhere(
            lambda comm, upload: to_host(comm.all_reduce_(upload(parts[comm.rank]))), direct
        )
        assert all((x.astype(np.float32) == 1 + 2.0**-7).all() for x in found)


def test_groups_keep_the_way_of_their_parent() -> None:
    def rank(comm: Communicator, upload: Any) -> Any:
        pair = comm.split(0 if comm.rank < 2 else 1)
        assert pair is not None
        return (
            type(comm).__name__,
            type(pair).__name__,
            type(comm.dup("other")).__name__,
            type(comm.split_by_node()).__name__,
        )

    staged, direct = everywhere(rank, False), everywhere(rank, True)
    name = StagedCommunicator.__name__
    assert staged == [(name, name, name, name)] * 2 + [(name, "SelfCommunicator", name, name)]
    assert direct[0] == (DirectCommunicator.__name__,) * 4
    assert run_ranks(2, lambda comm: on_device(comm, CPU) is comm) == [True, True]


@pytest.mark.parametrize("direct", [False, True], ids=["staged", "direct"])
def test_the_device_is_waited_for_before_a_message(direct: bool, gpu: Any) -> None:
    """Check that every way of sending waits for the device at least once."""

    def rank(comm: Communicator, upload: Any) -> None:
        x = upload(np.ones(10, np.float32))
        for act in (
            lambda: comm.all_reduce_(x),
            lambda: comm.iall_reduce_(x).wait(),
            lambda: comm.all_gather(x),
            lambda: comm.isend(x, comm.rank).wait(),
            lambda: comm.reduce_scatter(x, 0, [5, 5]),
        ):
            with gpu.counting() as events:
                act()
            assert ("wait", 0) in events

    run_ranks(
        2,
        lambda comm: rank(on_device(comm, open_device("cuda"), direct), open_device("cuda").upload),
        timeout=20,
    )


def test_a_missing_wait_and_a_buffer_used_too_early_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plant both bugs and check that the stand-in detects them."""
    x = np.arange(100, dtype=np.float32)

    def reduce(comm: Communicator, upload: Any) -> np.ndarray:
        return to_host(comm.all_reduce_(upload(x)))

    assert all(np.array_equal(found, RANKS * x) for found in everywhere(reduce, False))
    with monkeypatch.context() as patch:
        patch.setattr(Event, "synchronize", lambda self: None)
        with pytest.raises((AssertionError, RuntimeError)):
            assert all(np.array_equal(found, RANKS * x) for found in everywhere(reduce, False))
    start = staging.Staging._start_upload

    def forget_the_event(self: staging.Staging, host: np.ndarray, flat: Any) -> Event:
        start(self, host, flat)
        return Event()

    monkeypatch.setattr(staging.Staging, "_start_upload", forget_the_event)
    with pytest.raises(
        RuntimeError, match="overwritten while a copy to the device could still be reading them"
    ):
        everywhere(lambda comm, upload: to_host(comm.broadcast_(upload(x))), False)


# ---- how copies and messages follow one another


class Partner(Communicator):
    """Inner communicator of the first of two ranks.

    Every exchange is an event, and everything received is zeros.
    """

    def __init__(self, gpu: Any) -> None:
        super().__init__(0, 2, "pair", 1.0)
        self.gpu = gpu

    def _all_reduce(self, flat: np.ndarray, op: Any) -> None:
        self.gpu.note("exchange", flat.nbytes)

    def _broadcast(self, flat: np.ndarray, root: int) -> None:
        self.gpu.note("exchange", flat.nbytes)

    def _gather_into(self, out: np.ndarray, counts: list[int]) -> None:
        self.gpu.note("exchange", out.nbytes)

    def _reduce_scatter(self, flat: np.ndarray, counts: list[int]) -> np.ndarray:
        self.gpu.note("exchange", flat.nbytes)
        return flat[: counts[0]]

    def _isend(self, flat: np.ndarray, dest: int, tag: int) -> Work:
        self.gpu.note("exchange", flat.nbytes)
        return DoneWork()

    def _irecv(self, flat: np.ndarray, source: int, tag: int) -> Work:
        flat[...] = 0
        return self._isend(flat, source, tag)


@pytest.mark.parametrize(
    ("act", "order"),
    [
        (lambda comm, x: comm.all_reduce_(x), "dd wEu dwEu dwEu wEu"),
        (lambda comm, x: comm.broadcast_(x, 0), "dd wE dwE dwE wE"),
        (lambda comm, x: comm.broadcast_(x, 1), "Eu Eu wEu wEu"),
        (lambda comm, x: comm.all_gather(x[:32]), "dd wEu dwEu dwEu wEu"),
        (lambda comm, x: comm.reduce_scatter(x), "dddd wEu ddwEu ddwEu wEu"),
        (lambda comm, x: comm.send(x, 1), "dddd wE wE wE wE"),
        (lambda comm, x: comm.recv(x, 1), "EEEE uuuu"),
        (lambda comm, x: comm.all_to_all([x, x]), "EEEE dddd wE wE wE wE uuuu"),
    ],
)
def test_copies_overlap_with_messages(
    act: Callable[[Communicator, Any], Any], order: str, gpu: Any
) -> None:
    """Check the order of events for a message of four chunks.

    d: download, w: wait, E: exchange, u: upload. While one chunk is exchanged, the next is
    downloaded and the previous one uploaded.
    """
    x = gpu.ones(64, np.float32)
    comm = on_device(Partner(gpu), open_device("cuda"), direct=False)
    with gpu.counting() as events:
        act(comm, x)
    letters = {"download": "d", "upload": "u", "wait": "w", "exchange": "E"}
    assert "".join(letters[what] for what, _ in events) == order.replace(" ", "")
    assert all(num_bytes <= 64 for what, num_bytes in events)


def test_groups_share_their_buffers() -> None:
    def rank(comm: Communicator, upload: Any) -> bool:
        return comm.dup("other").staging is comm.staging  # type: ignore[attr-defined]

    assert all(everywhere(rank, False))
