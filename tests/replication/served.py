"""Runs of a tiny model with parameter servers on thread ranks, under a virtual clock if asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from training_helpers import (
    INIT_STD,
    OPTIMIZERS,
    Layout,
    assemble,
    make_batches,
    make_config,
    pieces,
)

from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.replication.costs import DataAxis
from minillm.replication.server import Server
from minillm.replication.server_messages import Request
from minillm.replication.server_shards import Applied
from minillm.replication.server_worker import Worker
from minillm.tasks.language_model import LanguageModeling
from minillm.tasks.protocol import Task
from minillm.training.costs import data_axis, server_axis
from minillm.training.resolve import ResolvedConfig
from minillm.training.serving import make_server, with_servers
from minillm.training.trainer import Trainer


@dataclass
class Served:
    """Outcome of a run: by worker rank, and the logs by server."""

    losses: list[list[float]]
    norms: list[list[float]]
    weights: dict[str, np.ndarray]  # agreed by all workers at the end
    logs: list[list[Applied]]
    counted: list[dict[tuple[str, str], int]]  # payload of every rank, servers last, with a meeting
    axes: list[DataAxis]  # of every rank
    values: list[Any] = field(default_factory=list)  # what `after` returned, by worker


class VirtualClock:
    """Event heap that decides which worker pushes next, by given times of computation.

    `times(worker, clock)` is how long a worker computes. A worker waits in `enter` until all others
    that could come before it have done so. A worker whose pull is deferred cannot come.
    """

    def __init__(self, workers: int, times: Callable[[int, int], float]) -> None:
        self.times, self.changed = times, threading.Condition()
        self.now = 0.0
        self.next = {worker: times(worker, 0) for worker in range(workers)}
        """Worker -> time of its next push. Workers that wait for an answer are absent."""
        self.clock = [0] * workers
        self.busy: int | None = None

    def enter(self, worker: int) -> None:
        """Return when it is this worker's turn to push."""
        with self.changed:
            assert self.changed.wait_for(lambda: self._turn(worker), 30), "the clock stands still"
            self.now = self.next.pop(worker)
            self.busy = worker

    def _turn(self, worker: int) -> bool:
        first = min(self.next, key=lambda w: (self.next[w], w), default=None)
        return self.busy is None and first == worker

    def answered(self, worker: int) -> None:
        """Begin the computation of a worker whose pull is answered."""
        with self.changed:
            self.clock[worker] += 1
            self.next[worker] = self.now + self.times(worker, self.clock[worker])
            self.changed.notify_all()

    def settled(self, worker: int) -> None:
        """Let the others go on: the request of `worker` has been handled or deferred."""
        with self.changed:
            if self.busy == worker:
                self.busy = None
                self.changed.notify_all()

    def leave(self, worker: int) -> None:
        """Take a worker out that has done its last step."""
        with self.changed:
            self.next.pop(worker, None)
            self.changed.notify_all()


def language_modeling(config: ResolvedConfig) -> Task:
    return LanguageModeling(make_batches(config))


def serve(
    model: str,
    layout: Layout,
    steps: range | int,
    *,
    optimizer: str = "adamw",
    prepare: Callable[[Trainer], None] | None = None,
    after: Callable[[Trainer], Any] | None = None,
    watch: Callable[[Server], None] | None = None,
    rendezvous: bool = False,
    make_task: Callable[[ResolvedConfig], Task] = language_modeling,
    **changes: Any,
) -> Served:
    """Train on thread ranks with the servers that `changes` name."""
    config = make_config(model, layout, **changes)
    number = config.options.replication.num_servers
    steps = range(steps) if isinstance(steps, int) else steps
    results = run_ranks(
        layout.num_ranks + number,
        lambda comm: _rank(comm, config, steps, optimizer, prepare, after, watch, make_task),
        rendezvous=rendezvous,
    )
    workers = results[: layout.num_ranks]
    logs = [result["log"] for result in results if result.get("log") is not None]
    return Served(
        [result["losses"] for result in workers],
        [result["norms"] for result in workers],
        assemble([result["weights"] for result in workers], 0.0),
        logs,
        [result["counted"] for result in results],
        [result["axis"] for result in results],
        [result["value"] for result in workers],
    )


def _rank(
    comm: Communicator,
    config: ResolvedConfig,
    steps: Sequence[int],
    optimizer: str,
    prepare: Callable[[Trainer], None] | None,
    after: Callable[[Trainer], Any] | None,
    watch: Callable[[Server], None] | None,
    make_task: Callable[[ResolvedConfig], Task],
) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "norms": [], "value": None}

    def make(wire: Communicator, config: ResolvedConfig) -> Server:
        server = make_server(wire, config, std=INIT_STD, optimizer=OPTIMIZERS[optimizer])
        found["log"] = server.shards[0].log
        found["axis"] = server_axis(config, server, wire.rank - config.mesh.num_ranks)
        if watch is not None:
            watch(server)
        return server

    def work(workers: Communicator, wire: Communicator | None) -> None:
        task = make_task(config)
        kind = OPTIMIZERS[optimizer]
        trainer = Trainer(config, workers, task, std=INIT_STD, optimizer=kind, wire=wire)
        method = trainer.replication
        if isinstance(method, Worker) and method.server is not None:
            found["log"] = method.server.shards[0].log
            if watch is not None:
                watch(method.server)
        if prepare is not None:
            prepare(trainer)
        built = {key: row.bytes for key, row in ledger().rows.items()}
        for step in steps:
            report = trainer.step(step)
            found["losses"].append(report.loss)
            found["norms"].append(report.grad_norm)
        method.meet()
        found["counted"], found["axis"] = _payload(built), data_axis(trainer)
        found["weights"] = pieces(trainer, "value")
        if after is not None:
            found["value"] = after(trainer)

    with_servers(comm, config, work, make)
    found.setdefault("counted", _payload({}))
    return found


def _payload(before: dict[Any, int]) -> dict[tuple[str, str], int]:
    """Return the payload bytes since the rows `before`."""
    return {
        key[:2]: row.bytes - before.get(key, 0)
        for key, row in ledger().rows.items()
        if key[2] == "payload" and row.bytes > before.get(key, 0)
    }


def under(clock: VirtualClock) -> dict[str, Any]:
    """Return the arguments of `serve` that let a clock decide the order of all pushes."""
    return {"prepare": partial(_timed_worker, clock), "watch": partial(_timed_server, clock)}


def _timed_worker(clock: VirtualClock, trainer: Trainer) -> None:
    method, worker = trainer.replication, trainer.mesh.coord("dp")
    update, meet = method.update, method.meet

    def timed(*args: Any) -> None:
        clock.enter(worker)
        update(*args)

    def met() -> None:
        clock.leave(worker)
        meet()

    method.update, method.meet = timed, met  # type: ignore[method-assign]


def _timed_server(clock: VirtualClock, server: Server) -> None:
    handle, answer = server.handle, server.answer

    def handled(source: int, request: Request) -> None:
        handle(source, request)
        if request.op == 3:
            clock.settled(server.place(source)[0])

    def answered(index: int, worker: int, request: Request) -> None:
        clock.answered(worker)
        answer(index, worker, request)

    server.handle, server.answer = handled, answered  # type: ignore[method-assign]
