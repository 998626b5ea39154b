"""Serial replay of an asynchronous run from the logs of its parameter servers.

One rank computes, for every line (worker, clock, version read, version applied) of a log,

    w[applied + 1] = optimizer(w[applied], gradient of the worker's batch at w[read])

and gets the same weights bit for bit. With several servers each key range has versions of its own:
a gradient takes from each the version that this server's log names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minillm import kernels
from minillm.base.arrays import Array
from minillm.base.device import CPU
from minillm.base.errors import ConfigError
from minillm.base.metrics_file import SERVER_LOG, steps_of
from minillm.comm.mesh import Mesh
from minillm.comm.single import SelfCommunicator
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.placement import Layout
from minillm.models.protocol import INIT_STD
from minillm.params.storage import PrivateMemory
from minillm.pipeline.action import Schedule
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import SCHEDULES
from minillm.replication.all_reduce import counted_grads
from minillm.replication.protocol import MakeOptimizer, Replication
from minillm.replication.server_shards import Applied, key_range, ranges
from minillm.tasks.protocol import Continuing, Task
from minillm.training.assembly import assemble
from minillm.training.batching import batch_of, microbatches_of, rows_of
from minillm.training.carried import Carried
from minillm.training.joint_loss import JointLoss
from minillm.training.optimizers import maker
from minillm.training.resolve import ResolvedConfig
from minillm.training.step import rate_of
from minillm.training.verdict import Judge


def read_logs(run: Path) -> list[list[Applied]]:
    """Return the logs of all servers of a run, in their order, from the files in its folder.

    Raises ConfigError if there is none, or if one does not begin with the first update or lacks
    one.
    """
    paths = sorted(run.glob(SERVER_LOG.format("*")), key=lambda path: int(path.stem.split("-")[1]))
    if not paths:
        raise ConfigError(f"{run} holds no log of a server; async and stale runs write one")
    logs = []
    for path in paths:
        lines = [json.loads(line) for _, line in steps_of(path)]
        logs.append([Applied(**{name: line[name] for name in Applied._fields}) for line in lines])
        if [line.applied for line in logs[-1]] != list(range(len(lines))):
            raise ConfigError(f"{path} does not hold all updates from the first one on")
    return logs


class LoneWorker:
    """All workers of an asynchronous run, one at a time, on one rank."""

    def __init__(self, config: ResolvedConfig, task: Task, std: float) -> None:
        self.config, self.task = config, task
        whole = (sum(config.stage_layers),)
        alone = dataclasses.replace(config, mesh=MeshShape(), stage_layers=whole)

        def alone_on(mesh: Mesh, layout: Layout) -> Replication:
            return Replication(mesh, layout, PrivateMemory())

        self.model = assemble(alone, SelfCommunicator(), std=std, replicate=alone_on)
        (self.buffers,) = self.model.buffers
        self._counted = counted_grads({0: self.buffers}, self.model.layout, self.model.mesh.coords)
        self._lowered = functools.cache(self._schedule)
        self._runtime = PipelineRuntime(
            self._lowered(config.num_microbatches),
            self.model.stages,
            SelfCommunicator(),
            self.model.replication,
            optimizer_step=lambda losses: None,
        )
        self._joint = JointLoss(self.model)
        self._judge = Judge(CPU, task.losses, config.options.optimization.clip, "")
        self._carried = [Carried(alone, self.model) for _ in range(config.mesh.dp)]

    def _schedule(self, number: int) -> Schedule:
        """Return the schedule of so many microbatches on one rank."""
        schedule = SCHEDULES[self.config.options.pipeline.schedule](1, number)
        return lower(schedule, ties=self.model.layout.tied_stages)

    def gradient(self, worker: int, clock: int, weights: Array) -> tuple[Array, float]:
        """Return a worker's gradient of its share of the global loss [n], and its scale."""
        config, number = self.config, self.config.mesh.dp
        self.buffers.values[...] = weights
        carried = self._carried[worker]  # moves on with the clocks of its worker alone
        if not (isinstance(self.task, Continuing) and self.task.continues(clock)):
            carried.forget()
        cut = microbatches_of(config, self.task, clock)
        rows = rows_of(cut, (cut.number,) * number, worker)
        batches = [carried.into(batch_of(self.task, clock, part, CPU), part) for part in rows]
        self._runtime.use(self._lowered(cut.number))
        self._runtime.run(self._joint.into(batches, (len(batches),)))
        squares = number**2 * sum(map(kernels.sum_of_squares, self._counted))
        verdict = self._judge.agree(SelfCommunicator(), clock, {}, squares)
        return self.buffers.grads.copy(), verdict.scale * number


class ReplayedRange:
    """Key range of one server, with the versions that are still to be read."""

    def __init__(
        self,
        worker: LoneWorker,
        part: slice,
        place: tuple[int, int],
        log: Sequence[Applied],
        make: MakeOptimizer,
    ) -> None:
        self.part, self.log, self.done = part, list(log), 0
        buffers = worker.buffers
        self.held = key_range(buffers.parameters, buffers.mesh, buffers.dtype, *place)
        self.held.values[...] = buffers.values[part]
        self.optimizer = make([self.held])
        self._needed = {line.read for line in log}
        self.versions: dict[int, Array] = {}
        self._keep(log[0].applied)

    def _keep(self, version: int) -> None:
        if version in self._needed:
            self.versions[version] = self.held.values.copy()

    def apply(self, grads: Array, lr: float, scale: float) -> None:
        """Update by the gradient of the next line of the log."""
        line = self.log[self.done]
        self.held.grads[...] = grads[self.part]
        self.optimizer.step(line.applied, lr, scale)
        self.done += 1
        self._keep(line.applied + 1)


def replay(
    config: ResolvedConfig,
    task: Task,
    logs: Sequence[Sequence[Applied]],
    *,
    std: float = INIT_STD,
    optimizer: MakeOptimizer | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Array:
    """Return the flat weights [n] that the logs of all servers, in their order, lead to.

    The run began with initial weights. `optimizer` replaces that of the options. A run with tp or
    pp is replayed to rounding, because sums over its ranks have another order.
    `advance` is called after each gradient. Not collective.
    """
    worker = LoneWorker(config, task, std)
    make = optimizer or maker(config.options.optimization)
    parts = ranges(worker.buffers, len(logs))
    held = [
        ReplayedRange(worker, part, (number, len(logs)), log, make)
        for number, (part, log) in enumerate(zip(parts, logs, strict=True))
    ]
    reads = [{(line.worker, line.clock): line.read for line in log} for log in logs]
    grads: dict[tuple[int, int], tuple[Array, float]] = {}
    while any(each.done < len(each.log) for each in held):
        for each in held:
            if each.done == len(each.log):
                continue
            line = each.log[each.done]
            key = line.worker, line.clock
            if key not in grads:
                versions = [found[key] for found in reads]
                if not all(v in other.versions for v, other in zip(versions, held, strict=True)):
                    continue  # another range must come to its version first
                weights = [o.versions[v] for v, o in zip(versions, held, strict=True)]
                grads[key] = worker.gradient(*key, np.concatenate(weights))
                advance()
            grad, scale = grads[key]
            each.apply(grad, rate_of(config, line.clock), scale)
    return np.concatenate([each.held.values for each in held])
