"""Planted bugs of the parameter server, each seen by the test that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_server as laws

from minillm.base.errors import CommTimeout
from minillm.replication.server import Server
from minillm.replication.server_messages import Op, Request
from minillm.replication.server_shards import Applied, FreeShard, Shard, SyncShard
from minillm.replication.server_worker import FreeWorker


def strict(shard: FreeShard, clock: int) -> bool:
    """Let a worker be one clock further ahead."""
    return min(shard.clocks) >= clock - shard.staleness - 1


def apply_repeated(shard: FreeShard, worker: int, request: Request, receive: Any) -> None:
    """Count a push as often as it comes."""
    shard.start(request.clock)
    shard.clocks[worker] = request.clock
    PUSH(shard, worker, request, receive)


def step_per_clock(shard: Shard, worker: int, clock: int, *args: Any) -> None:
    """Count the optimizer's steps by clocks."""
    version, shard.version = shard.version, clock
    read, lr, scale = args
    shard.optimizer.step(clock, lr, scale)
    shard.version = version
    shard.log.append(Applied(worker, clock, read, version))
    shard.version += 1


def by_arrival(shard: SyncShard, worker: int, request: Request, receive: Any) -> None:
    """Forget all gradients but the last."""
    SYNC_PUSH(shard, worker, request, receive)
    shard.buffers[0].grads *= 0.5


def answer_torn(server: Server, index: int, worker: int, request: Request) -> None:
    """Answer with half of the weights of the version before."""
    (buffers,), half = (
        server.shards[index].buffers,
        server.shards[index].buffers[0].values.size // 2,
    )
    whole = buffers.values.copy()
    before = OLD.get(id(buffers), whole)
    OLD[id(buffers)] = whole
    buffers.values[:half] = before[:half]
    ANSWER(server, index, worker, request)
    buffers.values[:] = whole


def answer_first(shard: FreeShard, worker: int, request: Request, receive: Any) -> None:
    """Apply a push after the pull that follows it has been answered."""
    late = LATE.pop((id(shard), worker), None)
    if late is not None:
        shard.receive_grads(lambda out: np.copyto(out, late[1]))
        shard.apply(worker, int(late[0].clock), int(late[0].version), late[0].lr, late[0].scale)
    shard.start(int(request.clock))
    shard.receive_grads(receive)
    LATE[id(shard), worker] = (request, shard.buffers[0].grads.copy())
    shard.clocks[worker] = request.clock + 1


def pull_amid(method: FreeWorker, stage: int, last: bool) -> Any:
    """Overwrite the weights between forward and backward pass."""
    if method._clock:
        method.pull(method._clock, (0, 0, 0))
    return OBSERVER(method, stage, last)


def never_release(server: Server, source: int, request: Request) -> None:
    """Count a worker that has left as one that still works."""
    clock = server.shards[0].clocks[server.place(source)[0]]
    HANDLE(server, source, request)
    if request.op == Op.LEAVE:
        server.shards[0].clocks[server.place(source)[0]] = clock


OLD: dict[int, np.ndarray] = {}
LATE: dict[tuple[int, int], Any] = {}
ANSWER, HANDLE, OBSERVER = Server.answer, Server.handle, FreeWorker.observer
PUSH, SYNC_PUSH = FreeShard.push, SyncShard.push


def replayed() -> None:
    laws.test_a_replay_of_the_logs_gives_the_bits(1, "adamw")


BUGS: list[tuple[Any, str, Any, Callable[[], None]]] = [
    (Server, "answer", answer_torn, replayed),
    (FreeWorker, "observer", pull_amid, replayed),
    (FreeShard, "push", answer_first, lambda: laws.test_one_worker_is_serial()),
    (
        Server,
        "handle",
        never_release,
        lambda: laws.test_a_worker_that_leaves_stops_no_other(timeout=3),
    ),
    (FreeShard, "together", False, laws.test_pushes_that_cross_are_applied_in_one_order),
    (FreeShard, "ready", strict, lambda: laws.test_clocks_and_staleness(1, laws.jumpy)),
    (FreeShard, "push", apply_repeated, laws.test_a_repeated_push_counts_once),
    (Shard, "apply", step_per_clock, replayed),
    (SyncShard, "push", by_arrival, lambda: laws.test_sync_has_the_bits_of_all_reduce(2, 1)),
]


@pytest.mark.mutations
@pytest.mark.parametrize(("kind", "name", "fault", "check"), BUGS)
def test_planted_bugs_are_seen(
    kind: Any, name: str, fault: Any, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, fault)
    with pytest.raises((AssertionError, CommTimeout)):
        check()
