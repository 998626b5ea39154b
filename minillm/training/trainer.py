"""Training: one step from batch to updated weights, evaluation, and what a checkpoint holds. The
loop around it is train.py.

A step: every rank runs its row of the schedule over its microbatches; gradients are reduced while
the last backward runs; all ranks agree on the loss, the norm and whether somebody asked to stop;
then all update, or none does. On a GPU that decision stays on the device, and the host reads the
numbers of a step only after it has queued the next one.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, NamedTuple

import numpy as np

from minillm.base.arrays import to_host
from minillm.base.device import CPU, Device
from minillm.base.errors import CommError
from minillm.base.trace import Tracer
from minillm.checkpoint import StateSource, StateTensor, load
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.mesh import Mesh
from minillm.comm.process import agree
from minillm.data.batches import Batches
from minillm.models.gpt import INIT_STD
from minillm.params.where import Where
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import SCHEDULES
from minillm.pipeline.stage import Microbatch
from minillm.training.assembly import (
    build_adamw,
    build_mesh,
    build_stages,
    optimizer_state,
    weights,
)
from minillm.training.memory import peak_rss, predicted
from minillm.training.optim import SGD, AdamW, learning_rate
from minillm.training.resolve import ResolvedConfig
from minillm.training.verdict import Verdict, judge


class StepReport(NamedTuple):
    """One step: what all ranks agreed on, learning rate, whether any rank was asked to stop, and
    the peak memory in bytes of the largest rank (on a GPU, of the device), the same on every rank;
    this rank's seconds in all, in reductions that backward did not hide, and in the optimizer.

    On a GPU `loss` and `grad_norm` wait for the device, and raise NotFinite if they are not finite.
    """

    step: int
    verdict: Verdict
    lr: float
    stop: bool
    peak_bytes: int
    seconds: float
    exposed_seconds: float
    optimizer_seconds: float

    @property
    def loss(self) -> float:
        """Mean loss of the step's tokens."""
        return self.verdict.numbers()[0]

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient, before clipping."""
        return self.verdict.numbers()[1]


class Trainer:
    """One rank's part of a training run. `std` is the scale of the initial weights; `optimizer`
    defaults to AdamW."""

    def __init__(
        self,
        config: ResolvedConfig,
        world: Communicator,
        batches: Batches,
        *,
        tracer: Tracer | None = None,
        std: float = INIT_STD,
        mesh: Mesh | None = None,
        optimizer: type[AdamW] | type[SGD] = AdamW,
        device: Device = CPU,
    ) -> None:
        self.config, self.world, self.batches, self.tracer, self.device = (
            config,
            world,
            batches,
            tracer,
            device,
        )
        self.mesh = mesh or build_mesh(world, config)
        self.stages = build_stages(config, self.mesh, std=std, device=device)
        self.buffers = [stage.buffers for stage in self.stages.values()]
        self.memory = self.buffers[0].memory
        self.optimizer = (
            build_adamw(config, self.stages) if optimizer is AdamW else SGD(self.buffers)
        )
        self.stop_requested = False
        if device is not CPU:
            needs = [
                predicted(config, index, stage.buffers) for index, stage in self.stages.items()
            ]
            device.reserve(sum(kinds["activations"] + kinds["logits"] for kinds in needs))
        schedule = SCHEDULES[config.train.schedule](config.pp, config.num_microbatches)
        ties = (0, config.pp - 1) if config.model.tied and config.pp > 1 else ()
        self.runtime = PipelineRuntime(
            lower(schedule, ties=ties),
            self.stages,
            self.mesh.axis("pp"),
            tracer=tracer,
            optimizer_step=self._optimizer_step,
        )
        self._reducers = [
            stage.reducer for stage in self.stages.values() if stage.reducer is not None
        ]
        self._times = np.arange(config.model.context)
        first = self.mesh.coord("dp") * config.microbatch * config.num_microbatches
        rows = np.arange(first, first + config.microbatch * config.num_microbatches)
        self._rows = np.split(
            rows, config.num_microbatches
        )  # this rank's sequences of the global batch, by microbatches
        train = config.train
        self._advice = f"try a smaller --lr (now {train.lr:g}), a longer --warmup (now {config.warmup}) or a smaller --clip"
        self._verdict: Verdict | None = None

    @property
    def lag(self) -> int:
        """How many steps the host is ahead of the numbers that it reads: 1 on a GPU."""
        return int(self.device is not CPU)

    def step(self, step: int) -> StepReport:
        """Run step `step` (from 0). Raises NotFinite, on every rank and before any update, if the
        loss or the gradient is not finite: on a GPU those of the step before, with no update
        since."""
        started, exposed = time.perf_counter(), self._exposed()
        self._step, before = step, self._verdict
        self.runtime.run(
            [self._microbatch(step, rows) for rows in self._rows], self.config.tokens_per_step
        )
        if before is not None and self.lag:
            before.numbers()  # so that the host is never more than a step ahead
        seconds = time.perf_counter() - started
        stop, peak = self._worst[0] > 0, int(self._worst[1])
        assert self._verdict is not None
        return StepReport(
            step,
            self._verdict,
            self._lr,
            stop,
            peak,
            seconds,
            self._exposed() - exposed,
            self._optimizer_seconds,
        )

    def _microbatch(self, step: int, rows: np.ndarray) -> Microbatch:
        inputs, targets = self.batches.microbatch(step, rows)
        where = Where(step, rows, self._times, device=self.device)
        return Microbatch(self.device.upload(inputs), self.device.upload(targets), where)

    def _optimizer_step(self, local_loss: Any) -> None:
        """Agree on loss, norm and stopping over all ranks, then update everywhere or nowhere."""
        train = self.config.train
        loss, squares = (
            local_loss if self.mesh.coord("tp") == 0 else 0.0,
            sum(reducer.sum_of_squares() for reducer in self._reducers),
        )
        self._verdict = judge(
            self.device,
            self.world,
            self._step,
            loss,
            squares,
            train.clip,
            self._verdict,
            self._advice,
        )
        self._worst = self.world.reduce_numbers(
            [self.stop_requested, self.device.peak_bytes() or peak_rss()], MAX
        )
        if not self.lag:
            self._verdict.numbers()
        self._lr = learning_rate(
            self._step,
            lr=train.lr,
            min_lr=self.config.min_lr,
            warmup=self.config.warmup,
            steps=train.steps,
            schedule=train.lr_schedule,
        )
        started = time.perf_counter()
        self.optimizer.step(self._step, self._lr, self._verdict.scale)
        self.memory.sync()
        self._optimizer_seconds = time.perf_counter() - started

    def _exposed(self) -> float:
        return sum(reducer.exposed_seconds for reducer in self._reducers)

    def state(self) -> list[StateTensor]:
        """Everything a resumed run needs besides the step: weights and optimizer state."""
        return [*weights(self.stages), *optimizer_state(self.stages, self.optimizer)]

    def load(self, source: StateSource) -> None:
        """Fill weights and optimizer state. Collective: every rank reads its part, those who share
        memory each a part of the tensors. Raises CheckpointError on every rank if one cannot."""
        mine = self.state()[self.memory.rank :: self.memory.size]
        agree(self.world, lambda: load(source, mine, self.mesh.shape, self.mesh.coords))
        self.memory.sync()

    def check_replicas(self) -> None:
        """Compare a hash of the parameters over the data-parallel replicas. Raises CommError naming
        the ranks that differ."""
        digest = hashlib.blake2b(digest_size=16)
        for buffers in self.buffers:
            digest.update(to_host(buffers.values).view(np.uint8).data)
        comm = self.mesh.axis("dp")
        hashes = comm.gather_json(digest.hexdigest())
        odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if odd:
            raise CommError(
                f"data-parallel replicas hold different parameters: dp ranks {odd} differ from dp "
                "rank 0; the run cannot "
                f"be trusted from here"
            )
