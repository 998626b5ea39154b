"""Training loop: steps, their report, evaluations, checkpoints, and the end of a run."""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from minillm import checkpoint, kernels
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.flags import to_toml
from minillm.base.log import Log, MetricsFile, clock, compact, paragraph
from minillm.base.progress import Progress
from minillm.base.trace import Tracer
from minillm.comm.agreement import AgreedError, agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import Row, RowKey, ledger
from minillm.comm.signals import StopRequest
from minillm.data.batches import Batches, eval_windows
from minillm.data.corpus import Corpus
from minillm.tasks.language_model import HeldOutText, LanguageModeling
from minillm.tasks.protocol import Result
from minillm.training.held_out import measure
from minillm.training.numeric_key import numeric_key
from minillm.training.report import TimeShares, peak_mb, plan, plural, step_metrics
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import StepReport, Trainer
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

    `found` is the checkpoint to continue from, None for a new run.
    """

    def __init__(
        self,
        comm: Communicator,
        device: Device,
        config: ResolvedConfig,
        corpus: Corpus,
        found: Path | None,
        tracer: Tracer | None,
        stop: StopRequest,
    ) -> None:
        self.comm, self.device, self.config, self.corpus = comm, device, config, corpus
        self.tracer, self.stop, self.log = tracer, stop, Log(comm.rank)
        self.output, optimization = config.options.output, config.options.optimization
        places = place_names(self.output.log_to)
        agree(comm, lambda: check_packages(places if comm.rank == 0 else []))
        self.out = Path(from_first(comm, lambda: str(prepare_folder(config, found))))
        batches = Batches(corpus.train, config.model.context, optimization.batch, optimization.seed)
        with known_to_all():
            self.trainer = Trainer(
                config, comm, LanguageModeling(batches), tracer=tracer, device=device
            )
        self.key = numeric_key(config, comm, self.trainer.replication.memory.alias[1], device)
        self.first_step = self._resume(found) if found is not None else 0
        self.last_step = min(optimization.steps, self.output.stop_after or optimization.steps)
        self.saved_step = self.first_step if found is not None else -1
        path = self.out / "metrics.jsonl" if comm.rank == 0 else None
        self.metrics = MetricsFile(path, self.first_step)
        self.progress = Progress(
            self.log,
            self.first_step,
            optimization.steps,
            config.tokens_per_step,
            flops=config.tokens_per_step * config.model.training_flops,
            every=self.output.log_interval(),
        )
        start = Start(self.out, config.filled().to_dict(), self.first_step)
        self.writers = agree(
            comm, lambda: Writers(places if comm.rank == 0 else [], start, self.progress.say)
        )
        self.shares = TimeShares()
        self.result: Result | None = None
        for label, text in plan(config, corpus, self.trainer.model, kernels.get_threads(), comm):
            self._say(label, text)
        self.log(f"output  {self.out}\n")

    def train(self) -> bool:
        """Run all steps; return whether the run came to its end, not to a request to stop."""
        gc.collect()
        # Reference counts free the tape. The collector would look for cycles that do not exist.
        gc.disable()
        started, stopped, step = time.perf_counter(), False, self.first_step
        waiting: deque[tuple[StepReport, Moved]] = deque()  # steps whose numbers are not read yet
        while step < self.last_step and not stopped:
            before = ledger().snapshot()
            self.trainer.stop_requested = self.stop.signal is not None
            with self._saving_before_a_failure():
                report = self.trainer.step(step)
            waiting.append((report, ledger().since(before)))
            step, stopped = step + 1, report.stop
            due = self._due(step, stopped)
            while len(waiting) > (0 if any(due) else self.trainer.lag):
                self._settle(*waiting.popleft(), due if not waiting else Due(False, False, False))
        self.progress.close()
        gc.enable()
        self._finish(step, time.perf_counter() - started, stopped)
        return not stopped

    def _due(self, step: int, stopped: bool) -> Due:
        """Return what follows `step` steps."""
        output, last = self.output, step == self.last_step

        def every(number: int) -> bool:
            return number > 0 and step % number == 0

        return Due(
            every(output.check_every),
            not stopped and (last or every(output.eval_every)),
            stopped or last or every(output.save_every),
        )

    def _settle(self, report: StepReport, moved: Moved, due: Due) -> None:
        """Read a step's numbers, show and write them, and do what is due."""
        step, found = report.step + 1, None
        with self._saving_before_a_failure():
            self.progress.update(step - 1, report.loss, report.lr, report.grad_norm)
        self.shares.add(report, moved)
        paused = time.perf_counter()
        if due.check:
            with known_to_all():
                self.trainer.check_replicas()
        if due.evaluate:
            found = self.result = self._evaluate()
            if found is not None and step != self.last_step:
                self.progress.evaluated(step, found.describe())
        if due.save:
            self._save(step)
        line = step_metrics(report, self.config.tokens_per_step, moved, self.device)
        line |= {} if found is None else found.values()
        self.metrics.write(**line)
        self.writers.write(line)
        self.progress.pause(time.perf_counter() - paused)

    @contextmanager
    def _saving_before_a_failure(self) -> Iterator[None]:
        """Save the weights before a step that failed, and raise an error that all ranks know."""
        try:
            yield
        except NotFinite as error:
            self._save(error.step)
            where = f"The weights before this step are saved in {self.out}"
            raise AgreedError(f"{error}. {where}") from None

    def _evaluate(self) -> Result | None:
        """Return the metrics on held-out text, None if nothing is held out."""
        tokens = self.output.eval_tokens
        if not tokens or len(self.corpus.held_out) < 2:
            return None
        windows = eval_windows(self.corpus.held_out, self.config.model.context, tokens)
        held_out = HeldOutText(windows, self.corpus.bytes_per_token)
        return measure(self.trainer.model, held_out, self.comm, self.config.microbatch)

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        record = checkpoint.RunRecord(
            config=self.config.saved_values(),
            tokenizer=self.corpus.tokenizer.to_json(),
            vocab=self.config.model.vocab,
            corpus=self.corpus.sha256,
            source=self.corpus.source,
            key=self.key,
        )
        with known_to_all():
            checkpoint.save(
                self.out / checkpoint.SUBFOLDER,
                world=self.comm,
                mesh_shape=self.trainer.mesh.shape,
                coords=self.trainer.mesh.coords,
                tensors=self.trainer.state(),
                meta=record.to_json(),
                step=step,
                keep=self.output.keep,
            )
        self.saved_step = step

    def _resume(self, found: Path) -> int:
        """Fill weights and optimizer state from a checkpoint; return the step to continue with."""
        with known_to_all():
            checkpoint.verify(found, self.comm)
            step = checkpoint.read_manifest(found).step
            before = checkpoint.RunRecord.read(found)
            if before.corpus != self.corpus.sha256:
                raise ConfigError(
                    f"{found} was trained on {before.source} with sha256 {before.corpus[:12]}, "
                    f"but {self.corpus.source} now has {self.corpus.sha256[:12]}; resume with the "
                    "same text"
                )
        self.trainer.load(checkpoint.CheckpointSource(found))
        self.log(f"resumed from {found} at step {step}")
        difference = checkpoint.difference(before.key, self.key)
        if difference:
            self.log(f"results continue to rounding, not bit for bit: {difference}")
        return step

    def _finish(self, step: int, seconds: float, stopped: bool) -> None:
        """Save, and print the totals."""
        self._save(step)
        self.metrics.close()
        self.writers.close()
        if self.tracer is not None:
            path = self.out / "trace.json"
            self.tracer.write(path, self.comm)
            self.log(f"trace   {path}: a timeline of all ranks, to open in ui.perfetto.dev")
        if step > self.first_step:
            first = self.first_step
            steps = f"steps {first + 1} to {step}" if first else plural(step, "step")
            self._say(
                "done",
                f"{steps} in {clock(seconds)}, "
                f"{compact(self.progress.rate(step - 1))} tokens/s, at most "
                f"{peak_mb(self.comm, self.device)} MB per rank",
            )
            self._say("time", self.shares.summary(self.comm))
            self._say("loss", self.progress.curve.describe())
        if stopped:
            self.log(f"stopped at step {step} as asked; go on with --resume {self.out}")
            return
        if self.result is not None:
            held_out = len(self.corpus.held_out) - 1
            self._say("result", self.result.summary(of=held_out))
        self.log(f"saved   {self.out}")
        self.log(f"next    python -m minillm.generate --checkpoint {self.out}")

    def _say(self, label: str, text: str) -> None:
        self.log(paragraph(label, text))


def prepare_folder(config: ResolvedConfig, found: Path | None) -> Path:
    """Make the run's folder and try to write there. A new run never writes into another's folder.

    Raises ConfigError if the folder holds a run or cannot be written.
    """
    asked, path = config.options.output.out, Path(config.out)
    if found is not None and asked is None:
        return found.parent.parent if found.parent.name == checkpoint.SUBFOLDER else found.parent
    if found is None and _holds_run(path):
        if asked is not None:
            raise ConfigError(
                f"--out {path} holds an earlier run; continue it with --resume {path}, or choose "
                "another folder"
            )
        numbered = (path.with_name(f"{path.name}-{n}") for n in range(2, 10_000))
        path = next(other for other in numbered if not _holds_run(other))
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--out {path} is not writable; choose another folder")
    (path / "config.toml").write_text(to_toml(config.filled()))
    return path


def _holds_run(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / checkpoint.SUBFOLDER).exists()
