"""Parameter server: equality with an all-reduce, replay of logs, staleness, bytes, checkpoints."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY
from mpi_helpers import mpirun, needs_mpirun
from served import Served, VirtualClock, serve, under
from training_helpers import (
    BASE,
    INIT_STD,
    OPTIMIZERS,
    Layout,
    compare,
    make_batches,
    make_config,
    reference,
    some_translations,
    train,
)

from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.token_batches import TokenBatches
from minillm.pipeline.action import Action, ActionKind
from minillm.pipeline.runtime import METHODS, PipelineRuntime
from minillm.replication.methods import payload
from minillm.replication.server import Server
from minillm.replication.server_messages import Op, Request
from minillm.tasks.language_model import LanguageModeling
from minillm.tasks.translation import Translating
from minillm.training.assembly import layout_of
from minillm.training.batching import microbatches_of
from minillm.training.costs import held_bytes
from minillm.training.memory import predicted, predicted_server
from minillm.training.replay import replay
from minillm.training.resolve import ResolvedConfig
from minillm.training.serving import with_servers
from minillm.training.trainer import Trainer

PROGRAM = Path(__file__).parents[1] / "programs/fault_program.py"
SLOW = pytest.mark.slow
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


@pytest.mark.parametrize(
    ("dp", "servers"), [(4, 1), pytest.param(2, 2, marks=SLOW), pytest.param(2, 1, marks=SLOW)]
)
def test_sync_has_the_bits_of_all_reduce(dp: int, servers: int) -> None:
    """Check equal bits where sums have the same order: also of the norm, if one server adds it."""
    options = {**SMALL, "dtype": "float32", "clip": 1.0 if servers == 1 else 1e9}
    expected = train("gpt2", Layout(dp=dp), optimizer="adamw", steps=3, **options)
    found = serve("gpt2", Layout(dp=dp), 3, server="sync", servers=servers, **options)
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
        pytest.param("llama", Layout(dp=4), 3, marks=SLOW),
        pytest.param("gpt2-untied", Layout(), 1, marks=SLOW),
        pytest.param("llama-tied", Layout(dp=2, tp=2, pp=2, num_microbatches=2), 2, marks=SLOW),
    ],
)
def test_sync_equals_one_rank(model: str, layout: Layout, servers: int) -> None:
    expected = reference(model, "adamw", 3, tuple(SMALL.items()))
    found = serve(model, layout, 3, server="sync", servers=servers, rendezvous=True, **SMALL)
    np.testing.assert_allclose(found.losses[0], expected.losses, rtol=1e-9)
    np.testing.assert_allclose(found.norms[0], expected.norms, rtol=1e-9)
    compare(found.weights, expected.weights, 1e-9, "weights")


def test_sync_without_dedicated_servers_is_zero_1() -> None:
    expected = serve("gpt2", Layout(dp=2), 2, **SMALL, zero=1)
    found = serve("gpt2", Layout(dp=2), 2, **SMALL, server="sync")
    assert found.counted == expected.counted
    assert found.losses == expected.losses
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


# ---- async and stale


@pytest.mark.parametrize(
    ("servers", "optimizer"),
    [(0, "adamw"), (2, "adamw"), *(pytest.param(n, "sgd", marks=SLOW) for n in (0, 1, 2))],
)
def test_a_replay_of_the_logs_gives_the_bits(servers: int, optimizer: str, steps: int = 3) -> None:
    options: dict[str, Any] = {**SMALL, "server": "async", "servers": servers, "lr": 0.01}
    config = make_config("gpt2", Layout(dp=2, num_microbatches=2), **options)
    found = serve(
        "gpt2",
        Layout(dp=2, num_microbatches=2),
        steps,
        optimizer=optimizer,
        after=lambda trainer: trainer.model.buffers[0].values.copy(),
        **options,
    )
    task, kind = LanguageModeling(make_batches(config)), OPTIMIZERS[optimizer]
    expected = replay(config, task, found.logs, std=INIT_STD, optimizer=kind)
    assert len(found.logs) == (servers or 2)
    for values in found.values:
        np.testing.assert_array_equal(values, expected)


def test_a_replay_follows_the_number_of_microbatches() -> None:
    """Train on batches by tokens, of which each step has a number of microbatches of its own."""
    pairs, tokens = some_translations(20, BASE["context"] - 1), 48
    options: dict[str, Any] = {"server": "async", "batch_tokens": tokens, "microbatch_tokens": 16}
    layout = Layout(dp=2)

    def make_task(config: ResolvedConfig) -> Translating:
        return Translating(pairs, BASE["context"], TokenBatches(pairs.lengths, tokens, 3), 3)

    def values(trainer: Trainer) -> np.ndarray:
        return trainer.model.buffers[0].values.copy()

    found = serve("seq2seq", layout, 4, after=values, make_task=make_task, **options)
    config = make_config("seq2seq", layout, **options)
    task = make_task(config)
    numbers = {microbatches_of(config, task, step).number for step in range(4)}
    assert len(numbers) > 1
    expected = replay(config, task, found.logs, std=INIT_STD, optimizer=OPTIMIZERS["adamw"])
    for each in found.values:
        np.testing.assert_array_equal(each, expected)


def test_one_worker_is_serial() -> None:
    expected = train("gpt2", Layout(), optimizer="adamw", steps=3, **SMALL)
    found = serve("gpt2", Layout(), 3, **SMALL, **ASYNC)
    assert found.losses[0] == expected.losses
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


@pytest.mark.parametrize(
    ("staleness", "times"),
    [(1, jumpy), (math.inf, unequal)]
    + [pytest.param(s, t, marks=SLOW) for s in (0, 2, math.inf) for t in (unequal, jumpy)],
)
def test_clocks_and_staleness(staleness: float, times: Callable[[int, int], float]) -> None:
    steps, workers = 6, 4
    found = simulate(Layout(dp=workers), steps, staleness, times)
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


@pytest.mark.parametrize("staleness", [1, pytest.param(math.inf, marks=SLOW)])
def test_a_virtual_clock_decides_everything(staleness: float) -> None:
    found, again = (simulate(Layout(dp=3), 3, staleness, jumpy, batch=6) for _ in range(2))
    assert found.logs == again.logs
    assert found.losses == again.losses
    for name, weight in found.weights.items():
        np.testing.assert_array_equal(weight, again.weights[name])


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
    (log,) = simulate(Layout(dp=4), 4, 2, jumpy).logs
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


def test_a_worker_that_leaves_stops_no_other(timeout: float = 20) -> None:
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

    run_ranks(3, lambda comm: with_servers(comm, config, work), timeout=timeout)


def test_pushes_that_cross_are_applied_in_one_order() -> None:
    """Let the push of worker 0 surround that of worker 1: it begins before and ends behind it.

    Copies of replicated weights agree on the ranks of a worker, bit for bit.
    """
    came = {rank: threading.Event() for rank in range(4)}  # ranks 0 and 1 are worker 0

    def crossing(trainer: Trainer) -> None:
        method, after = trainer.replication, {1: 3, 2: 0, 3: 2}.get(trainer.world.rank)
        push = method.push

        def pushed(request: Request) -> None:
            assert after is None or came[after].wait(20)
            push(request)

        method.push = pushed

    def watch(server: Server) -> None:
        handle = server.handle

        def handled(source: int, request: Request) -> None:
            handle(source, request)
            if request.op == Op.PUSH:
                came[source].set()

        server.handle = handled  # type: ignore[method-assign]

    layout, options = Layout(dp=2, tp=2), {**SMALL, **ASYNC}
    (log,) = serve("gpt2", layout, 2, prepare=crossing, watch=watch, **options).logs
    assert [line.worker for line in log[:2]] == [1, 0]
    assert log[1].applied - log[1].read == 1


# ---- bytes and memory


@pytest.mark.parametrize(
    ("mode", "servers", "layout"),
    [
        ("sync", 2, Layout(dp=2, tp=2)),
        ("stale", 0, Layout(dp=4)),
        pytest.param("async", 1, Layout(dp=2), marks=SLOW),
        pytest.param("stale", 1, Layout(dp=2, tp=2, pp=2, num_microbatches=2), marks=SLOW),
        pytest.param("async", 2, Layout(dp=2), marks=SLOW),
    ],
)
def test_the_formula_is_what_the_ledger_counts(mode: str, servers: int, layout: Layout) -> None:
    found = serve("gpt2", layout, 2, **SMALL, server=mode, servers=servers)
    for counted, axis in zip(found.counted, found.axes, strict=True):
        mine = {key: n for key, n in counted.items() if key[0].startswith("dp")}
        assert mine and mine == payload(axis, 2, meetings=1)


# ---- memory


@pytest.mark.parametrize(("mode", "servers"), [("sync", 1), ("async", 0), ("stale", 2)])
def test_held_bytes_are_predicted(mode: str, servers: int) -> None:
    options: dict[str, Any] = {**SMALL, "server": mode, "servers": servers}
    config = make_config("gpt2", Layout(dp=2), **options)
    kept: list[int] = []
    found = serve(
        "gpt2",
        Layout(dp=2),
        1,
        after=held_bytes,
        watch=lambda server: kept.append(sum(shard.num_bytes for shard in server.shards)),
        **options,
    )
    need = predicted(config, layout_of(config), 0)
    assert max(found.values) == pytest.approx(need.held, rel=0.01)
    if servers:
        size = predicted_server(config, layout_of(config)).held
        assert max(kept) == pytest.approx(size, rel=0.01)


def test_a_slow_rank_takes_longer() -> None:
    """Check that a rank idles for twice the time that it computes; waits do not count."""
    naps: list[float] = []
    run = SimpleNamespace(
        slowdown=3.0, replication=SimpleNamespace(progress=lambda: naps.append(1))
    )
    started = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, ActionKind.F, lambda run, action: time.sleep(0.02))
        PipelineRuntime._slowly(run, Action(ActionKind.F, 0, 0))
    assert time.perf_counter() - started >= 0.059
    assert naps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "flags"),
    [
        ("kill", 1, ["--server=async", "--servers=1"]),
        ("server", 2, ["--server=sync", "--servers=1"]),
        ("raise", 0, ["--server=stale"]),
    ],
)
@needs_mpirun
def test_all_ranks_end_when_one_does(
    fault: str, rank: int, flags: list[str], tmp_path: Path
) -> None:
    sizes = dict(layers=1, dim=16, heads=2, context=16, batch=12, steps=40)
    command = [str(PROGRAM), fault, str(rank), *(f"--{k}={n}" for k, n in sizes.items()), *flags]
    done = mpirun(3, [*command, f"--out={tmp_path / 'run'}"])
    assert done.returncode not in (0, None)
    assert ("misfortune" if fault == "raise" else "signal 9") in done.output
