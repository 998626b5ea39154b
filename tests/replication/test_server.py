"""Parameter server: equality with an all-reduce, replay of logs, staleness, bytes, checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY
from served import Served, VirtualClock, serve, under
from training_helpers import (
    INIT_STD,
    OPTIMIZERS,
    Layout,
    compare,
    make_batches,
    make_config,
    reference,
    train,
)

from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.replication import server as server_module
from minillm.replication.methods import payload
from minillm.replication.server import FreeShard, Request, Shard, SyncShard
from minillm.tasks.language_model import LanguageModeling
from minillm.training.replay import replay
from minillm.training.serving import with_servers
from minillm.training.trainer import Trainer

SMALL: dict[str, Any] = TINY | {"dropout": 0.0}
SYNC: dict[str, Any] = {"server": "sync", "servers": 1}
ASYNC: dict[str, Any] = {"server": "async", "servers": 1}
UNEQUAL = (1.0, 1.3, 1.7, 2.9)


def unequal(worker: int, clock: int) -> float:
    return UNEQUAL[worker]


def jumpy(worker: int, clock: int) -> float:
    """Return times of which now one worker, now another is the slowest."""
    return 1.0 + (7 * worker + 5 * clock) % 11


def simulate(
    layout: Layout, steps: int, staleness: float, times: Callable[[int, int], float], **more: Any
) -> Served:
    """Run `steps` clocks under a virtual clock."""
    mode: dict[str, Any] = {"server": "async"}
    if staleness < math.inf:
        mode = {"server": "stale", "staleness": int(staleness)}
    options = {**SMALL, **mode, "servers": 1, **more}
    return serve("gpt2", layout, steps, **options, **under(VirtualClock(layout.dp, times)))


# ---- sync


@pytest.mark.parametrize(("dp", "servers"), [(2, 1), (4, 1), (2, 2)])
def test_sync_has_the_bits_of_all_reduce(dp: int, servers: int) -> None:
    """Check equal bits where sums have the same order: also of the norm, if one server adds it."""
    options: dict[str, Any] = {"dtype": "float32", "clip": 1.0 if servers == 1 else 1e9}
    expected = train("gpt2", Layout(dp=dp), optimizer="adamw", **options)
    found = serve("gpt2", Layout(dp=dp), 5, server="sync", servers=servers, **options)
    assert all(losses == expected.losses for losses in found.losses)
    if servers == 1:
        assert found.norms[0] == expected.norms
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


@pytest.mark.parametrize(
    ("model", "layout", "servers"),
    [
        ("gpt2", Layout(dp=2, tp=2, sp=True, num_microbatches=2), 1),
        ("gpt2", Layout(dp=2, pp=2, num_microbatches=2), 2),
        ("llama", Layout(dp=2), 3),
        ("gpt2-untied", Layout(), 1),
    ],
)
def test_sync_equals_one_rank(model: str, layout: Layout, servers: int) -> None:
    expected = reference(model, "adamw")
    found = serve(model, layout, 5, server="sync", servers=servers, rendezvous=True)
    np.testing.assert_allclose(found.losses[0], expected.losses, rtol=1e-9)
    np.testing.assert_allclose(found.norms[0], expected.norms, rtol=1e-9)
    compare(found.weights, expected.weights, 1e-9, "weights")


def test_sync_without_dedicated_servers_is_zero_1() -> None:
    expected = serve("gpt2", Layout(dp=2), 3, zero=1)
    found = serve("gpt2", Layout(dp=2), 3, server="sync")
    assert found.counted == expected.counted
    assert found.losses == expected.losses
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


# ---- async and stale


@pytest.mark.parametrize("servers", [0, 1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_replay_of_the_logs_gives_the_bits(servers: int, optimizer: str) -> None:
    options: dict[str, Any] = {**SMALL, "server": "async", "servers": servers, "lr": 0.01}
    config = make_config("gpt2", Layout(dp=2, num_microbatches=2), **options)
    found = serve(
        "gpt2",
        Layout(dp=2, num_microbatches=2),
        4,
        optimizer=optimizer,
        after=lambda trainer: trainer.model.buffers[0].values.copy(),
        **options,
    )
    task, kind = LanguageModeling(make_batches(config)), OPTIMIZERS[optimizer]
    expected = replay(config, task, found.logs, std=INIT_STD, optimizer=kind)
    assert len(found.logs) == (servers or 2)
    for values in found.values:
        np.testing.assert_array_equal(values, expected)


def test_one_worker_is_serial() -> None:
    expected = train("gpt2", Layout(), optimizer="adamw", steps=3)
    found = serve("gpt2", Layout(), 3, **ASYNC)
    assert found.losses[0] == expected.losses
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


@pytest.mark.parametrize("times", [unequal, jumpy])
@pytest.mark.parametrize("staleness", [0, 1, math.inf])
def test_clocks_and_staleness(staleness: float, times: Callable[[int, int], float]) -> None:
    steps, workers = 6, 4
    found = simulate(Layout(dp=workers), steps, staleness, times)
    again = simulate(Layout(dp=workers), steps, staleness, times)
    assert found.logs == again.logs, "the virtual clock does not decide"
    assert found.losses == again.losses
    (log,) = found.logs
    assert [line.applied for line in log] == list(range(workers * steps))
    assert Counter(line.worker for line in log) == dict.fromkeys(range(workers), steps)
    if staleness == math.inf:
        check_identity(log, workers)
        return
    gaps = []
    for line in log:
        seen = Counter(earlier.worker for earlier in log[: line.read])
        gaps.append(line.clock - min(seen[worker] for worker in range(workers)))
        before = [e.applied for e in log if e.clock <= line.clock - staleness - 1]
        assert all(applied < line.read for applied in before), "a read misses an early update"
        assert line.applied - line.read <= (workers - 1) * (2 * staleness + 1)
    assert max(gaps) == staleness if times is jumpy or not staleness else max(gaps) <= staleness


def check_identity(log: list[Any], workers: int) -> None:
    """Check that ages of applied updates and of those in flight add up, until a worker leaves.

    At each moment before, sum of staleness + ages in flight = (N - 1) x updates: a push makes
    every other gradient in flight one update older.
    """
    first_to_leave = next(line.applied for line in log if line.clock == log[-1].clock)
    reads = dict.fromkeys(range(workers), 0)
    total = 0
    for line in log[: first_to_leave + 1]:
        assert line.read == reads[line.worker]
        total += line.applied - line.read
        reads[line.worker] = updates = line.applied + 1
        in_flight = sum(updates - read for read in reads.values())
        assert total + in_flight == (workers - 1) * updates


def test_every_worker_reads_its_own_writes() -> None:
    (log,) = simulate(Layout(dp=4), 5, 2, jumpy).logs
    last: dict[int, int] = {}
    for line in log:
        assert line.read > last.get(line.worker, -1)
        last[line.worker] = line.applied


def test_a_repeated_push_counts_once() -> None:
    def twice(trainer: Trainer) -> None:
        method = trainer.replication
        push = method.push

        def pushed(request: Request) -> None:
            push(request)
            push(request)

        method.push = pushed

    for mode in (SYNC, ASYNC):
        options: dict[str, Any] = {**SMALL, **mode}
        once = serve("gpt2", Layout(), 3, **options)
        found = serve("gpt2", Layout(), 3, prepare=twice, **options)
        assert found.losses == once.losses
    assert found.logs == once.logs


def test_a_worker_that_leaves_stops_no_other() -> None:
    config = make_config("gpt2", Layout(dp=2), **SMALL, server="stale", staleness=0, servers=1)

    def work(workers: Communicator, wire: Communicator | None) -> None:
        task = LanguageModeling(make_batches(config))
        trainer = Trainer(config, workers, task, wire=wire)
        for step in range(5 if workers.rank == 0 else 2):
            if workers.rank == 0 or step == 0:
                trainer.step(step)
            else:  # the last update, after which this worker pulls no more
                trainer.replication.conclude = lambda numbers: numbers
                trainer.step(step)

    run_ranks(3, lambda comm: with_servers(comm, config, work), timeout=20)


# ---- bytes and memory


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize(("mode", "servers"), [("sync", 2), ("async", 1), ("stale", 0)])
def test_the_formula_is_what_the_ledger_counts(mode: str, servers: int, layout: Layout) -> None:
    if layout.tp > 1 and mode != "sync":
        return
    found = serve("gpt2", layout, 2, **SMALL, server=mode, servers=servers)
    for counted, axis in zip(found.counted, found.axes, strict=True):
        mine = {key: n for key, n in counted.items() if key[0].startswith("dp")}
        assert mine and mine == payload(axis, 2, meetings=1)


# ---- planted bugs, each seen by the test that it names


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
    shard.log.append(server_module.Applied(worker, clock, read, version))
    shard.version += 1


def by_arrival(shard: SyncShard, worker: int, request: Request, receive: Any) -> None:
    """Forget all gradients but the last."""
    SYNC_PUSH(shard, worker, request, receive)
    shard.buffers[0].grads *= 0.5


PUSH, SYNC_PUSH = FreeShard.push, SyncShard.push
BUGS: list[tuple[Any, str, Any, Callable[[], None]]] = [
    (FreeShard, "ready", strict, lambda: test_clocks_and_staleness(1, jumpy)),
    (FreeShard, "push", apply_repeated, test_a_repeated_push_counts_once),
    (Shard, "apply", step_per_clock, lambda: test_a_replay_of_the_logs_gives_the_bits(1, "adamw")),
    (SyncShard, "push", by_arrival, lambda: test_sync_has_the_bits_of_all_reduce(2, 1)),
]


@pytest.mark.mutations
@pytest.mark.parametrize(("kind", "name", "fault", "check"), BUGS)
def test_planted_bugs_are_seen(
    kind: Any, name: str, fault: Any, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, fault)
    with pytest.raises(AssertionError):
        check()
