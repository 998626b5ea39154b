"""Training step: from the batches of a step to updated weights. The loop around it is train.py.

Every rank runs its row of the schedule over its microbatches. Gradients are reduced while the last
backward pass runs. All ranks agree on the loss, the norm and requests to stop; then all update, or
none does. On a GPU the decision stays on the device, and the host reads the numbers of a step only
after it has queued the next one.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from minillm.base.arrays import to_host
from minillm.base.device import CPU, Device
from minillm.base.errors import CheckpointError, CommError
from minillm.base.trace import Tracer
from minillm.checkpoint import StateSource, StateTensor, load
from minillm.comm.agreement import agree
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.ledger import ledger
from minillm.comm.mesh import Mesh
from minillm.data.microbatches import Load, load_of
from minillm.layout.placement import Layout
from minillm.models.protocol import INIT_STD
from minillm.models.traced import trace_layers
from minillm.nn.lora import FACTORS
from minillm.pipeline.action import Schedule
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime, Sums
from minillm.pipeline.schedules import SCHEDULES, idle
from minillm.replication.balance import SpeedBalance
from minillm.replication.protocol import MakeOptimizer, Replication
from minillm.tasks.protocol import Continuing, Task, Unequal
from minillm.training.assembly import assemble
from minillm.training.batching import batch_of, microbatches_of, rows_of
from minillm.training.carried import Carried
from minillm.training.joint_loss import JointLoss
from minillm.training.memory import predicted
from minillm.training.optimizers import maker
from minillm.training.resolve import ResolvedConfig
from minillm.training.spikes import Spikes
from minillm.training.step import StepReport, rate_of
from minillm.training.verdict import Judge


class Trainer:
    """One rank's part of a training run.

    `std` is the scale of the initial weights. `schedule`, `replicate` and `optimizer` replace the
    pipeline schedule, the data-parallel method and the optimizer that the configuration names.
    `deals` returns the number of microbatches of each replica in a step, as a run with --balance
    has logged them. `clock` measures speed. `wire` reaches dedicated servers, ranks behind those of
    `world` (serving.py). `commit` is called before each update, and may raise to prevent it.
    `spikes` decides which updates are left out. Collective over `world`.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        world: Communicator,
        task: Task,
        *,
        tracer: Tracer | None = None,
        std: float = INIT_STD,
        optimizer: MakeOptimizer | None = None,
        device: Device = CPU,
        schedule: Schedule | None = None,
        replicate: Callable[[Mesh, Layout], Replication] | None = None,
        deals: Callable[[int], Sequence[int]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wire: Communicator | None = None,
        commit: Callable[[], None] = lambda: None,
        spikes: Spikes | None = None,
    ) -> None:
        self.spikes = spikes or Spikes()
        self.config, self.world, self.task, self.device = config, world, task, device
        optimization = config.options.optimization
        if schedule is None:
            schedule = _schedule(config, config.num_microbatches)
        self.model = assemble(
            config,
            world,
            std=std,
            device=device,
            rank_of_stage=schedule.rank_of_stage,
            replicate=replicate,
            wire=wire,
        )
        self.mesh, self.replication = self.model.mesh, self.model.replication
        self._carried, self._joint = Carried(config, self.model), JointLoss(self.model)
        make = optimizer or maker(optimization, self.mesh)
        self.optimizer = self.replication.optimizer(make)
        if not device.on_host:
            need = predicted(config, self.model.layout, self.mesh.coord("pp"))
            device.reserve(need.kinds["activations"] + need.kinds["logits"])
        if tracer is not None:
            for stage in self.model.stages.values():
                trace_layers(stage.model, tracer)
        lowered = functools.partial(
            lower, ties=self.model.layout.tied_stages, sharded=self.replication.sharded
        )
        self._lowered = functools.cache(lambda number: lowered(_schedule(config, number)))
        slow = config.options.replication.slow
        self.runtime = PipelineRuntime(
            lowered(schedule),
            self.model.stages,
            self.mesh.axis("pp"),
            self.replication,
            tracer=tracer,
            optimizer_step=self._optimizer_step,
            clock=clock,
            slowdown=slow[1] if world.rank == slow[0] else 1.0,
        )
        replicas = self.mesh.axis("dp", "ep")
        self._replica, self._deals = replicas.rank, deals
        self._balance: SpeedBalance | None = None
        if config.options.replication.balance != "none" and deals is None and replicas.size > 1:
            self._balance = SpeedBalance(world, replicas.rank, config.deal, config.mesh.pp - 1)
        clip = f"smaller --clip (now {optimization.clip:g})" if optimization.clip else "--clip 1"
        advice = (
            f"try a smaller --lr (now {optimization.lr:g}), a longer --warmup (now "
            f"{config.warmup}) or a {clip}"
        )
        self._judge = Judge(device, task.losses, optimization.clip, advice)
        # The ranks along tp compute equal losses: the first one counts.
        self._counts_losses = self.mesh.coord("tp") == 0
        self._commit = commit
        self.begun = self.done = 0
        """Steps whose update has begun, and is complete, on this rank."""
        self.last: StepReport | None = None
        """Outcome of the last update; of this rank alone until the step is over."""
        self.stop_requested = False
        self.clock = 0.0  # s; the ranks agree on their largest

    @property
    def lag(self) -> int:
        """Steps by which the host is ahead of the numbers that it reads.

        1 on a GPU, unless it decides about spikes.
        """
        return int(not (self.device.on_host or self.spikes.on))

    def step(self, step: int) -> StepReport:
        """Run step `step` (from 0). Collective.

        Raises NotFinite on every rank, before any update, if the loss or the gradient is not
        finite. On a GPU the error arrives one step late; no later step has changed the weights.
        """
        self._started, exposed = time.perf_counter(), self.replication.exposed_seconds
        self._step, before = step, self._judge.last
        ledger().step = step + 1
        self._deal = self._dealt(step)
        place = step + self.spikes.jump
        if not (isinstance(self.task, Continuing) and self.task.continues(place)):
            self.forget()
        batches = [
            self._carried.into(batch_of(self.task, place, rows, self.device), rows)
            for rows in self._rows()
        ]
        self.runtime.run(self._joint.into(batches, self._deal))
        if self._balance is not None:
            self._balance.add(self.runtime.compute_seconds)
        if before is not None and self.lag:
            before.numbers()  # so that the host is never more than a step ahead
        exposed = self.replication.exposed_seconds - exposed
        self.last = self._report(self._worst, time.perf_counter() - self._started, exposed)
        return self.last

    def forget(self) -> None:
        """Let the rows of a recurrent model begin anew, as after a gap in the data."""
        self._carried.forget()

    def _report(self, worst: Sequence[float], seconds: float, exposed: float) -> StepReport:
        stop, peak, clock = worst
        return StepReport(
            self._step,
            self._verdict,
            self._lr,
            stop > 0,
            clock,
            int(peak),
            seconds,
            exposed,
            self._optimizer_seconds,
            self._deal if self._is_dealt else (),
            self._load,
            self._spike,
        )

    def _dealt(self, step: int) -> tuple[int, ...]:
        """Return the microbatches of each replica in this step, and take up their schedule."""
        place = step + self.spikes.jump
        self._cut = microbatches_of(self.config, self.task, place)
        self._load: Load | None = None
        if isinstance(self.task, Unequal):
            self._load = load_of(self.task.row_lengths(place), self._cut, self.task.together)
        even = self.config.dealt(self._cut.number)
        if self._deals is not None:
            deal = tuple(self._deals(step))
        else:
            deal = even if self._balance is None else self._balance.deal
        assert sum(deal) == sum(even), f"{deal} are not all microbatches of a step"
        number = deal[self._replica]
        if number != self.runtime.schedule.num_microbatches:
            self.runtime.use(self._lowered(number))
        return deal

    def _rows(self) -> Iterator[np.ndarray]:
        """Yield this rank's sequences of the global batch, by microbatches."""
        return rows_of(self._cut, self._deal, self._replica)

    @property
    def _is_dealt(self) -> bool:
        """True if replicas may run different numbers of microbatches."""
        return self._balance is not None or self._deals is not None or len(set(self._deal)) > 1

    def _check_deal(self, ranks: Communicator) -> None:
        """Raise CommError on every rank unless all have dealt alike. Collective over `ranks`."""
        deal = float(zlib.crc32(repr(self._deal).encode()))
        most, least = ranks.reduce_numbers([deal, -deal], MAX)
        if most != -least:
            raise CommError(
                f"step {self._step + 1}: the ranks dealt microbatches differently, so this update "
                "was not applied; this is a fault of minillm, please report it"
            )

    def _optimizer_step(self, losses: Sums) -> None:
        """Agree on losses, norm and stopping, then update everywhere or nowhere."""
        ranks = self.replication.agreeing
        # The losses of the ranks that agree are means over the global batch: of their share alone.
        share = self.world.size / ranks.size
        own = {name: share * loss for name, loss in losses.items()} if self._counts_losses else {}
        squares = self.replication.sum_of_squares()
        workers = self.replication.workers
        self._verdict = self._judge.agree(ranks, self._step, own, squares, workers)
        peak = self.device.peak_bytes()
        if self._is_dealt:
            self._check_deal(ranks)
        self._spike = None if self.lag else self.spikes.judge(self._step, self._verdict)
        self._lr = rate_of(self.config, self._step)
        self._commit()
        started, self.begun = time.perf_counter(), self._step + 1
        scale = self._verdict.scale
        if self._spike is not None:
            scale = scale * math.nan  # changes nothing
            self._judge.last = None
        self.replication.update(self.optimizer, self._step, self._lr, scale)
        if self._spike is not None:
            self.forget()
        self.done = self._step + 1
        self._optimizer_seconds = time.perf_counter() - started
        worst = [self.stop_requested, peak, self.clock]
        self.last = self._report(worst, time.perf_counter() - self._started, 0.0)
        self._worst = self.replication.conclude(worst)

    def state(self) -> list[StateTensor]:
        """Return everything a resumed run needs besides the step.

        To be read or written within `Replication.agreed`.
        """
        return [*self._common_state(), *self._replica_state(), *self._carried.tensors()]

    def _common_state(self) -> list[StateTensor]:
        return [*self.model.weights(), *self._optimizer_state()]

    def _replica_state(self) -> list[StateTensor]:
        """Return what belongs to the data-parallel method."""
        own = self.replication.own_state(self._optimizer_state())
        return [*own, *self.replication.state()]

    def _optimizer_state(self) -> Iterator[StateTensor]:
        differs = self.replication.workers[1] > 1
        for name, states in self.optimizer.state().items():
            for stage, state in zip(self.model.stages, states, strict=True):
                for parameter, sharded, data in state.tensors():
                    owned = self.model.layout.owns(stage, parameter.spec.tie)
                    full_name = f"optimizer/{name}/{parameter.name}"
                    yield StateTensor(full_name, sharded, data, owned=owned, differs=differs)

    def load(self, source: StateSource) -> None:
        """Fill weights, optimizer state, and the state of the data-parallel method.

        Ranks that share memory read a part of the tensors each. Collective. Raises CheckpointError
        on every rank if one cannot read.
        """
        memory = self.replication.memory
        first, step = memory.alias
        with self.replication.agreed():
            self._fill(source, self._common_state()[first::step])
            self.replication.adopt()
            self._fill(source, self._replica_state()[first::step])
        self._fill(source, list(self._carried.tensors()))
        self.replication.loaded()
        memory.sync()

    def _fill(self, source: StateSource, tensors: Sequence[StateTensor]) -> None:
        """Fill `tensors` from `source`, or raise on every rank. Collective."""
        agree(
            self.world,
            lambda: load(source, tensors, self.mesh.shape, self.mesh.coords),
            CheckpointError,
        )

    def load_weights(self, source: StateSource, fresh: Collection[str] = ()) -> None:
        """Fill the weights alone; the optimizer's state stays at its beginning.

        The tensors named in `fresh`, and factors of low-rank updates, keep their initial values.
        Where the model has masters, they take the masters of `source`, or its weights. Collective.
        Raises CheckpointError on every rank if one cannot read.
        """
        memory = self.replication.memory
        tensors = list(self.model.weights())
        named = frozenset(source.names())
        for buffers in self.model.buffers:
            if buffers.masters is None:
                continue
            for parameter, sharded, data in buffers.tensors(buffers.masters, "state"):
                name = f"optimizer/master/{parameter.name}"
                name = name if name in named else f"model/{parameter.name}"
                tensors.append(StateTensor(name, sharded, data))
        first, step = memory.alias
        held = [t for t in tensors if t.name not in fresh and FACTORS not in t.name]
        self._fill(source, held[first::step])
        memory.sync()
        self.replication.adopt()

    def check_replicas(self) -> None:
        """Compare a hash of the agreed parameters over the data-parallel replicas. Collective.

        Raises CommError naming the ranks that differ.
        """
        digest = hashlib.blake2b(digest_size=16)
        with self.replication.agreed():
            for buffers in self.model.buffers:
                for held in buffers.all:
                    digest.update(to_host(held.values).view(np.uint8).data)
        hashes = self.replication.copies.gather_json(digest.hexdigest())
        odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if odd:
            raise CommError(
                f"data-parallel replicas hold different parameters: dp ranks {odd} differ from dp "
                "rank 0; the run cannot be trusted from here"
            )


def _schedule(config: ResolvedConfig, number: int) -> Schedule:
    """Return the schedule that the configuration names, for `number` microbatches a replica."""
    num_ranks = config.mesh.pp
    if not number:
        return idle(range(num_ranks))
    return SCHEDULES[config.options.pipeline.schedule](num_ranks, number)
