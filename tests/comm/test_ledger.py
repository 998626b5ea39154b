"""The ledger: bytes of each operation, wire bytes of a ring, and the order of collectives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minillm.base.errors import CommError, CommTimeout
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.ledger import Ledger, Row, ledger, recording
from minillm.comm.threads import run_ranks

# operation -> (call on 4 ranks with an array of 12 float32, payload bytes, ring bytes sent)
OPERATIONS: dict[str, tuple[Callable[[Communicator, np.ndarray], Any], int, float]] = {
    "all_reduce": (lambda comm, x: comm.all_reduce_(x), 48, 2 * 36),
    "reduce_scatter": (lambda comm, x: comm.reduce_scatter(x), 48, 36),
    "all_gather": (lambda comm, x: comm.all_gather(x), 192, 144),
    "all_to_all": (lambda comm, x: comm.all_to_all(np.split(x, 4)), 48, 36),
    "broadcast": (lambda comm, x: comm.broadcast_(x), 48, 36),
    "send": (lambda comm, x: comm.sendrecv(x, comm.rank ^ 1, x.copy(), comm.rank ^ 1), 48, 48),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_bytes_of_one_call(name: str) -> None:
    call, payload, wire = OPERATIONS[name]

    def rank(comm: Communicator) -> Row:
        call(comm, np.ones(12, np.float32))
        return ledger().rows["world", name, "payload"]

    for row in run_ranks(4, rank):
        assert (row.calls, row.bytes, row.wire) == (1, payload, wire) and row.seconds > 0


def test_a_launched_reduction_counts_once_and_its_events_are_reported() -> None:
    def rank(comm: Communicator) -> tuple[dict, list[str]]:
        names: list[str] = []
        with recording(on_event=lambda name, axis, start, end, num_bytes: names.append(name)) as it:
            comm.iall_reduce_(np.ones((2, 3)).T).wait()  # not contiguous
            before = it.snapshot()
            assert it.since(before) == {}
            comm.barrier()
            return {key: row.calls for key, row in it.since(before).items()}, names

    for calls, names in run_ranks(2, rank):
        assert calls == {("world", "barrier", "control"): 1}
        assert names == ["wait", "iall_reduce", "barrier"]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CommError, match="kind 'payloads' of send on 'dp' is unknown; choose one"):
        Ledger().record("dp", "send", "payloads", 1)


def test_a_time_out_names_the_last_operations_and_what_each_rank_waits_for() -> None:
    def rank(comm: Communicator) -> str:
        comm.all_reduce_(np.ones(3, np.float32), MAX)
        with pytest.raises(CommTimeout) as caught:
            comm.barrier() if comm.rank else comm.recv(np.empty(2), 1, 7)
        return str(caught.value)

    messages = run_ranks(2, rank, timeout=0.3)
    assert "rank 0 waits for a message from rank 1 of 'world', tag 7" in messages[0]
    assert "rank 1 waits for operation 1 on 'world' (barrier)" in messages[1]
    place = r"comm/test_ledger\.py:\d+"
    done, pending = (
        rf"all_reduce max float32 \(3,\) on 'world', 12 bytes, {place}: \d",
        rf"receive from rank 1 tag 7 on 'world', 16 bytes, {place}: not finished",
    )
    assert re.search(done, messages[0]) and re.search(pending, messages[0])


# ---- the order of collectives


def different(comm: Communicator) -> None:
    """Call the same collective on all ranks, then another one on rank 1."""
    x = np.ones(3, np.float32)
    comm.all_reduce_(x)
    if comm.rank == 1:
        comm.broadcast_(x, 1)
    else:
        comm.all_reduce_(x)


def test_check_order_names_the_first_difference_on_every_rank() -> None:
    def rank(comm: Communicator) -> str:
        with pytest.raises(CommError) as caught:
            different(comm)
        return str(caught.value)

    with recording(check_order=True):
        messages = run_ranks(3, rank)
    text = (
        "ranks of 'world' call different collectives: number 1 is all_reduce sum float32 (3,) "
        "on ranks [0, 2], but broadcast float32 (3,) from 1 on ranks [1]"
    )
    assert messages == [text] * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda comm, x: comm.all_reduce_(x, MAX) if comm.rank else comm.all_reduce_(x),
        lambda comm, x: comm.all_reduce_(x[: 3 - comm.rank]),
        lambda comm, x: comm.all_gather(x.astype(np.float64) if comm.rank else x),
        lambda comm, x: comm.all_gather(x.reshape(1, 3), comm.rank),
        lambda comm, x: comm.broadcast_(x, comm.rank),
        lambda comm, x: comm.barrier() if comm.rank else comm.gather_json(None),
        lambda comm, x: comm.iall_reduce_(x) if comm.rank else comm.all_reduce_(x),
    ],
    ids=["reduction", "shape", "dtype", "dim", "root", "control", "launch"],
)
def test_check_order_compares_all_that_must_agree(call: Callable) -> None:
    with (
        recording(check_order=True),
        pytest.raises(CommError, match=r"number 0 is .* on ranks .*, but .* on ranks"),
    ):
        run_ranks(2, lambda comm: call(comm, np.ones(3, np.float32)))


def test_check_order_changes_no_result_and_no_payload() -> None:
    def rank(comm: Communicator) -> tuple[list[float], dict]:
        x = np.arange(4.0) * (comm.rank + 1)
        comm.all_reduce_(x)
        comm.sendrecv(x, comm.rank ^ 1, x.copy(), comm.rank ^ 1)
        return comm.all_gather(x, 0, [4, 4]).tolist(), ledger().payload()

    plain = run_ranks(2, rank)
    with recording(check_order=True):
        assert run_ranks(2, rank) == plain
