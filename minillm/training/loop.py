"""Training loop: steps, their report, evaluations, checkpoints, and the end of a run."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from minillm import checkpoint
from minillm.base.device import Device
from minillm.base.flags import to_toml
from minillm.base.host_memory import resident
from minillm.base.lock import FolderLock
from minillm.base.log import Log, clock, compact, paragraph, plural
from minillm.base.metrics_file import METRICS, MetricsFile
from minillm.base.progress import Progress
from minillm.base.trace import Tracer
from minillm.comm.agreement import AgreedError, agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.cores import threads_in_use
from minillm.comm.ledger import Row, RowKey, ledger
from minillm.comm.signals import StopRequest
from minillm.tasks.protocol import Dataset, Result, Unequal
from minillm.training import going_on, loading
from minillm.training.assembly import model_shapes
from minillm.training.batching import drawn
from minillm.training.early_stopping import EarlyStopping
from minillm.training.folder import begin, way_back
from minillm.training.heartbeat import Heartbeat
from minillm.training.held_out import Stopped, measure
from minillm.training.numeric_key import numeric_key
from minillm.training.origin import Origin
from minillm.training.report import TimeShares, peak_mb, plan, step_metrics
from minillm.training.resolve import ResolvedConfig
from minillm.training.saving import Saver
from minillm.training.spikes import Spikes, answer
from minillm.training.step import StepReport
from minillm.training.survival import Survivors, Welcome
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite
from minillm.training.writers import Start, Writers, check_packages, place_names

Moved = Mapping[RowKey, Row]  # what the ledger counted during a step


class Due(NamedTuple):
    """Work that follows a step."""

    check: bool  # compare the replicas
    evaluate: bool
    save: bool


class Run:
    """One training run of this rank. Collective over `comm`.

    `out` is the folder that it owns. `origin` is the checkpoint to start from, None for initial
    weights. `wire` reaches dedicated servers. `welcome` is for a rank that joins the run later.
    """

    def __init__(
        self,
        comm: Communicator,
        device: Device,
        config: ResolvedConfig,
        data: Dataset,
        out: Path,
        origin: Origin | None,
        tracer: Tracer | None,
        stop: StopRequest,
        wire: Communicator | None = None,
        welcome: Welcome | None = None,
    ) -> None:
        self.comm, self.device, self.config, self.data = comm, device, config, data
        self.tracer, self.stop, self.log = tracer, stop, Log(comm.rank)
        self.output, optimization = config.options.output, config.options.optimization
        self.out, self.origin, self._wire = out, origin, wire
        self.left, self._stopped = False, False
        self.unsettled: StepReport | None = None
        """Outcome of a step that is done, but not written by all ranks before a loss."""
        self.outcome: StepReport | None = None  # of the last step that this rank has done
        self.started_with = comm.size
        self.lock: FolderLock | None = None  # of a first rank that another one was before
        self.last_step = min(optimization.steps, self.output.stop_after or optimization.steps)
        self.saver, self.shares = Saver(self), TimeShares()
        self.result: Result | None = None
        self.survivors: Survivors | None = None
        self.is_new = welcome is not None  # without a trainer until it has joined the others
        self.owns = comm.rank == 0 and not self.is_new  # the folder
        self.stopping = EarlyStopping(self.output.patience, None)
        if welcome is None:
            self._start(resident())
        else:
            self._join(welcome)

    def _join(self, welcome: Welcome) -> None:
        """Take part in a run that has begun. Not collective."""
        told = welcome.run
        self.key: dict[str, Any] = {}
        self.first_step, self.started_with = told["first_step"], told["started_with"]
        self.spikes = Spikes(self.config.options.spikes, told["spikes"])
        start = self.first_step + self.spikes.jump
        self._task, self._read_before = drawn(self.config, self.data, told["position"], start)
        self.survivors = going_on.survivors(self, welcome)

    def _start(self, program: int) -> None:
        """Begin the run, from its origin if there is one. Collective.

        `program` are the bytes that this process has held before.
        """
        comm, config, data, origin = self.comm, self.config, self.data, self.origin
        places = place_names(self.output.log_to)
        agree(comm, lambda: check_packages(places if comm.rank == 0 else []))
        self.first_step = origin.first_step if origin else 0
        if origin is not None and origin.continues:
            shapes, old = model_shapes(config), origin.path
            agree(comm, lambda: checkpoint.check_shapes(checkpoint.CheckpointSource(old), shapes))
        with known_to_all():
            held = origin.record.spikes if origin and origin.continues else None
            self.spikes = Spikes(config.options.spikes, held)
            position, moved = origin.position(data, config.options) if origin else (0, None)
            start = self.first_step + self.spikes.jump
            self._task, self._read_before = drawn(config, data, position, start)
            if config.options.comm.on_failure != "stop" and comm.size > 1:
                self.survivors = going_on.survivors(self)
            self.trainer = self.survivors.trainer if self.survivors else self.make(config, comm)
        self.trainer.replication.record(self.out, self.tracer)
        alias = self.trainer.replication.memory.alias[1]
        self.key = numeric_key(config, comm, alias, self.device)
        if origin is not None:
            self.load(origin, moved)
        self.trainer.begun = self.trainer.done = self.first_step
        self.settled = self.first_step  # steps whose numbers are written, and saved if due
        held = None if origin is None else origin.stopping(config.options)
        self.stopping = EarlyStopping(self.output.patience, held)
        self.saved_step = self.first_step if origin and origin.continues else -1
        self.begin_policy()
        toml = to_toml(config.options.replace(out=None), config.filled().replace(out=None))
        for line in from_first(comm, lambda: begin(self.out, toml, origin)):
            self.log(line)
        agree(comm, lambda: self.open_places(self.first_step))
        threads, unequal = threads_in_use(), isinstance(self._task, Unequal)
        for label, text in plan(config, data, self.trainer.model, threads, comm, program, unequal):
            self._say(label, text)
        if self.survivors is not None:
            self._say("losses", going_on.describe(config))
            if self.survivors.buddies is not None:
                self._say("buddy", self.survivors.buddies.describe())
        if self.spikes.on:
            self._say("spikes", self.spikes.describe())
        self.log(f"output  {self.out}\n")
        self.heartbeat.beat()

    def make(
        self,
        config: ResolvedConfig,
        comm: Communicator,
        commit: Callable[[], None] = lambda: None,
    ) -> Trainer:
        """Return a trainer with initial values. Collective over `comm`."""
        return Trainer(
            config,
            comm,
            self._task,
            tracer=self.tracer,
            device=self.device,
            wire=self._wire,
            commit=commit,
            spikes=self.spikes,
        )

    def position(self, step: int) -> int:
        """Return the number of the first sequence of the data that step `step` reads."""
        return self._read_before(step + self.spikes.jump)

    def begin_policy(self) -> None:
        """Count the time to the next checkpoint from the next step on."""
        self.policy = checkpoint.SavePolicy(checkpoint.SaveEvery.parse(self.output.save_every))

    def open_places(self, step: int) -> None:
        """Open what is written after `step` steps: progress lines and metrics, on the first rank.

        Not collective.
        """
        config, first = self.config, self.comm.rank == 0
        self.progress = Progress(
            self.log,
            step,
            config.options.optimization.steps,
            config.tokens_per_step,
            flops=config.tokens_per_step * config.model.training_flops,
            every=self.output.log_interval(),
        )
        start = Start(self.out, config.filled().to_dict(), step)
        places = place_names(self.output.log_to) if first else []
        self.writers = Writers(places, start, self.progress.say)
        self.metrics = MetricsFile(self.out / METRICS if first else None, self.progress.say)
        self.heartbeat = Heartbeat(self.out, self.comm.rank)

    def close_places(self) -> None:
        """Close what `open_places` has opened."""
        self.progress.close()
        self.metrics.close()
        self.writers.close()

    def train(self) -> bool:
        """Run all steps; return whether the run came to its end, not to a request to stop.

        A rank that is left without a replica after a loss returns False, and `left` is True.
        """
        gc.collect()
        gc.disable()  # reference counts free the tape; there are no cycles to look for
        self._began = time.perf_counter()
        if self.survivors is None:
            self._steps()
        else:
            self.left = not going_on.train(self, self._steps)
        gc.enable()
        if self.left:
            return False
        self._finish(self.trainer.done, time.perf_counter() - self._began, self._stopped)
        self.heartbeat.end()
        return not self._stopped

    def _steps(self) -> None:
        """Run the steps that are left, and save the last one."""
        started, stopped, step = self._began, False, self.trainer.done
        waiting: deque[tuple[StepReport, Moved]] = deque()  # steps whose numbers are not read yet
        if self.spikes.rewinds and self.saved_step < 0:
            self._save(step)  # a place to go back to
        if self.unsettled is not None:  # before a loss
            self._settle(self.unsettled, {}, self._due(step, False, 0.0))
        while step < self.last_step and not stopped and not self.stopping.over:
            before = ledger().snapshot()
            if self.survivors is not None:
                self.survivors.keep()
            self.trainer.stop_requested = self.stop.asked()
            self.trainer.clock = time.perf_counter() - started if self.comm.rank == 0 else 0.0
            with self._saving_before_a_failure():
                report = self.trainer.step(step)
            self.heartbeat.beat()
            if report.spike is not None and (back := answer(self, report)) is not None:
                step = back
                continue
            waiting.append((report, ledger().since(before)))
            step, stopped = step + 1, report.stop
            due = self._due(step, stopped, report.clock)
            while len(waiting) > (0 if any(due) else self.trainer.lag):
                self._settle(*waiting.popleft(), due if not waiting else Due(False, False, False))
        self._stopped = stopped
        self._save(step)
        self.saver.wait()

    def _due(self, step: int, stopped: bool, clock: float) -> Due:
        """Return what follows `step` steps, the last of them at `clock` seconds."""
        output, last = self.output, step == self.last_step

        def every(number: int) -> bool:
            return number > 0 and step % number == 0

        evaluate = not stopped and (last or every(output.eval_every))
        wanted = self.policy.wants(step, clock, evaluate)
        return Due(every(output.check_every), evaluate, stopped or last or wanted)

    def release(self) -> None:
        """Release the folder, if this rank owns it since a loss."""
        if self.lock is not None:
            self.lock.release()

    def _settle(self, report: StepReport, moved: Moved, due: Due) -> None:
        """Read a step's numbers, show and write them, and do what is due."""
        step, found, improved = report.step + 1, None, False
        with self._saving_before_a_failure():
            self._show(report)
        self.shares.add(report, moved)
        paused = time.perf_counter()
        method = self.trainer.replication.metrics()
        if any(due):
            self.trainer.replication.meet()
        self.saver.advance(met=any(due))
        if due.check:
            with known_to_all():
                self.trainer.check_replicas()
        if due.evaluate:
            found = self.result = self._evaluate()
            if found is not None:
                improved = self.stopping.add(step, found)
                if step != self.last_step:
                    self.progress.evaluated(step, found.describe())
        line = step_metrics(report, self.config.tokens_per_step, moved, self.device)
        line |= method | self.saver.metrics()
        line |= {} if found is None else found.values()
        self.metrics.write(**line)
        self.writers.write(line)
        if due.save or improved:
            self._save(step, found)
        if self.survivors is not None and any(due):
            self.survivors.commit()  # else a loss may have left arbitrary numbers in the metrics
        self.settled, self.unsettled = step, None
        self.progress.pause(time.perf_counter() - paused)

    def _show(self, report: StepReport) -> None:
        """Show a step that is done, or the reason why its update was left out."""
        tokens = self.config.tokens_per_step if report.load is None else report.load.real
        if report.spike is None:
            numbers = report.loss, report.lr, report.grad_norm
            self.progress.update(report.step, *numbers, tokens)
        else:
            self.progress.say(f"step {report.step + 1} is left out: {report.spike.text}")
            self.progress.pause(report.seconds)

    @contextmanager
    def _saving_before_a_failure(self) -> Iterator[None]:
        """Save the weights before a step that failed, and raise an error that all ranks know.

        They are set aside: from them the same step fails whatever the rate. The error names an
        earlier checkpoint to go back to.
        """
        try:
            yield
        except NotFinite as error:
            if not self.trainer.replication.lockstep:  # the other workers do not know
                raise
            step = error.step
            self._save(step, left=True)
            self.saver.wait()
            way = from_first(self.comm, lambda: way_back(self.out, step))
            raise AgreedError(f"{error}. {way}") from None

    def _evaluate(self) -> Result | None:
        """Return the metrics on held-out data, None if nothing is held out or a stop is asked."""
        tokens = self.output.eval_tokens
        if not tokens or not self.data.num_held_out:
            return None
        held_out = self.data.measure(self.config.model, tokens)
        model, microbatch = self.trainer.model, self.config.microbatch
        with suppress(Stopped), self.trainer.replication.agreed():
            beat = self.heartbeat.beat
            return measure(
                model, held_out, self.comm, microbatch, self.stop.asked, lambda rows: beat()
            )
        return None

    def _save(self, step: int, found: Result | None = None, left: bool = False) -> None:
        """Write a checkpoint unless there is one; `found` are the metrics of this step.

        With `left` it is set aside.
        """
        if step != self.saved_step:
            self.saver.save(step, found, left)
            self.saved_step = step
            self.policy.saved()
            self.heartbeat.beat()

    def load(self, origin: Origin, moved: str | None) -> None:
        """Fill the state from the checkpoint of `origin`, and say what changes with this run."""
        loading.load(self, origin, moved)

    def _finish(self, step: int, seconds: float, stopped: bool) -> None:
        """Print the totals."""
        self.close_places()
        if step > self.first_step:
            first = self.first_step
            steps = f"steps {first + 1} to {step}" if first else plural(step, "step")
            self._say(
                "done",
                f"{steps} in {clock(seconds)}, "
                f"{compact(self.progress.rate())} tokens/s, at most "
                f"{peak_mb(self.comm, self.device)} MB per rank",
            )
            self._say("time", self.shares.summary(self.comm))
            if saving := self.saver.summary():
                self._say("saving", saving)
            if padding := self.shares.padding():
                self._say("padding", padding)
            self._say("loss", self.progress.curve.describe())
        if stopped:
            self.log(f"stopped at step {step} as asked; go on with --resume {self.out}")
            return
        if self.stopping.over:
            self._say("ended", f"at step {step}: {self.stopping.describe()}")
        if self.result is not None:
            self._say("result", self.result.summary(of=self.data.num_held_out))
        self.log(f"saved   {self.out}")
        self.log(f"next    {self.config.family.first_reader} --checkpoint {self.out}")

    def _say(self, label: str, text: str) -> None:
        self.log(paragraph(label, text))
