"""Train a GPT: `python -m minillm.train`, or `mpirun -n 4 python -m minillm.train --tp 2` for
several ranks.

This file is the loop around `Trainer`: read the options, load the text, build or resume, step,
report, evaluate, save, and show a sample at the end.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from minillm import checkpoint, kernels
from minillm.base.compute import ComputeOptions
from minillm.base.device import CPU, Device, open_device
from minillm.base.errors import ConfigError
from minillm.base.flags import to_toml
from minillm.base.log import Log, MetricsFile, Progress, clock, compact
from minillm.base.trace import Tracer
from minillm.comm.agreement import AgreedError, agree, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.ledger import Row, RowKey, ledger, recording
from minillm.comm.process import run_program
from minillm.comm.signals import StopRequest
from minillm.data.batches import Batches, eval_windows
from minillm.data.corpus import Corpus, load_corpus
from minillm.data.tokenizers import tokenizer_from_json
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.tasks.language_model import HeldOutText, LanguageModeling
from minillm.tasks.protocol import Result
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.config import RunConfig
from minillm.training.held_out import measure
from minillm.training.numeric_key import numeric_key
from minillm.training.report import TimeShares, peak_mb, plan, plural, step_metrics
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import StepReport, Trainer
from minillm.training.verdict import NotFinite

SAMPLE_TEMPERATURE = 0.8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(lambda words: parse_train_args(words, saved=_saved_values), _train, argv)


def _train(comm: Communicator, given: tuple[StartOptions, RunConfig]) -> None:
    start, options = given
    comm.timeout = options.comm.comm_timeout
    resume, on = start.resume, options.compute.device
    found = agree(comm, lambda: checkpoint.find(Path(resume))) if resume else None
    local_rank = comm.split_by_node().rank
    device = CPU if start.print_config else agree(comm, lambda: open_device(on, local_rank))
    corpus, config = _plan(comm, options, found)
    if start.print_config:
        Log(comm.rank)(to_toml(config.filled()).rstrip())
        return
    comm = on_device(comm, device)
    tracer = Tracer(comm.rank) if options.output.trace else None
    with ExitStack() as stack:
        stack.enter_context(
            kernels.use(**agree(comm, lambda: _kernel_choices(options.compute, device)))
        )
        stack.enter_context(
            recording(
                check_order=options.comm.check_order,
                on_event=tracer.communication if tracer else None,
            )
        )
        stop = stack.enter_context(StopRequest(announces=comm.rank == 0).listening())
        run = Run(comm, device, config, corpus, found, tracer, stop)
        run.train()


def _kernel_choices(compute: ComputeOptions, device: Device) -> dict[str, str]:
    """What --kernels names, op by op. Raises ConfigError where that cannot run here."""
    try:
        choices = kernels.choices_from(compute.kernels)
        with kernels.use(**choices):
            for op in kernels.ops():
                kernels.chosen(op, device.like(op, compute.dtype))
    except kernels.KernelUnavailable as error:
        raise ConfigError(f"--kernels {compute.kernels}: {error}") from None
    return choices


def _saved_values(path: str) -> dict[str, Any]:
    """The configuration that the checkpoint at `path` was trained with."""
    return dict(checkpoint.RunRecord.read(checkpoint.find(Path(path))).config)


def _plan(
    comm: Communicator, options: RunConfig, found: Path | None
) -> tuple[Corpus, ResolvedConfig]:
    """The text and the resolved configuration, checked on every rank before anything is
    allocated."""
    data, model = options.corpus, options.model
    with known_to_all():
        tokenizer: Any = data.tokenizer
        if found is not None:
            tokenizer = tokenizer_from_json(checkpoint.RunRecord.read(found).tokenizer)
        corpus = load_corpus(
            data.data, tokenizer, context=model.context, vocab=model.vocab, comm=comm
        )
        config = resolve(options, comm.size, corpus.vocab_size)
    return corpus, config


class Run:
    """One training run of this rank: what is reported, evaluated and saved around the steps."""

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
        self.comm, self.device, self.config, self.corpus, self.tracer, self.stop = (
            comm,
            device,
            config,
            corpus,
            tracer,
            stop,
        )
        self.log = Log(comm.rank)
        self.out = agree(comm, lambda: _prepare_out(comm.rank, config, found))
        self.out = Path(comm.broadcast_json(str(self.out)))
        optimization = config.options.optimization
        batches = Batches(corpus.train, config.model.context, optimization.batch, optimization.seed)
        with known_to_all():
            task = LanguageModeling(batches)
            self.trainer = Trainer(config, comm, task, tracer=tracer, device=device)
        self.key = numeric_key(config, comm, self.trainer.replication.memory.alias[1], device)
        self.first_step = self._resume(found) if found is not None else 0
        self.saved_step = self.first_step if found is not None else -1
        self.metrics = MetricsFile(
            self.out / "metrics.jsonl" if comm.rank == 0 else None, self.first_step
        )
        self.shares = TimeShares()
        for line in [
            *plan(config, corpus, self.trainer.model, kernels.get_threads(), comm),
            f"output  {self.out}",
            "",
        ]:
            self.log(line)

    def train(self) -> None:
        """All steps with their evaluations and checkpoints, then a sample."""
        steps = self.config.options.optimization.steps
        last = min(steps, self.config.options.output.stop_after or steps)
        progress = Progress(self.log, self.first_step, steps, self.config.tokens_per_step)
        gc.collect()
        # the tape is freed by reference counts; the collector would only look for cycles that are
        # not there
        gc.disable()
        started, stopped = time.perf_counter(), False
        step, found = self.first_step, None
        waiting: deque[tuple[StepReport, Mapping[RowKey, Row]]] = (
            deque()
        )  # steps whose numbers have not been read
        while step < last and not stopped:
            before = ledger().snapshot()
            report = self._step(step)
            waiting.append((report, ledger().since(before)))
            step += 1
            stopped = report.stop
            due = self._is_due(step, last, stopped)
            while len(waiting) > (0 if due else self.trainer.lag):
                found = self._settle(
                    *waiting.popleft(), last, stopped, progress, due=due and not waiting
                )
        progress.close()
        gc.enable()
        self._finish(step, time.perf_counter() - started, stopped, progress, found)

    def _settle(
        self,
        report: StepReport,
        moved: Mapping[RowKey, Row],
        last: int,
        stopped: bool,
        progress: Progress,
        *,
        due: bool,
    ) -> Result | None:
        """Read a step's numbers, show and write them, and do what is due after it; returns the
        evaluation, if that was."""
        step = report.step + 1
        with self._saving_before_a_failure():
            progress.update(step - 1, report.loss, report.lr, report.grad_norm)
        self.shares.add(report, moved)
        paused = time.perf_counter()
        found = self._between_steps(step, last, stopped, progress) if due else None
        line = step_metrics(report, self.config.tokens_per_step, moved, self.device)
        self.metrics.write(**line, **({} if found is None else found.values()))
        progress.pause(time.perf_counter() - paused)
        return found

    def _is_due(self, step: int, last: int, stopped: bool) -> bool:
        """Whether something happens after `step` steps that needs them finished."""
        output = self.config.options.output
        return (
            stopped
            or step == last
            or any(
                every and step % every == 0
                for every in (output.check_every, output.eval_every, output.save_every)
            )
        )

    def _step(self, step: int) -> StepReport:
        self.trainer.stop_requested = self.stop.signal is not None
        with self._saving_before_a_failure():
            return self.trainer.step(step)

    @contextmanager
    def _saving_before_a_failure(self) -> Iterator[None]:
        """Save what was before a step that failed, and raise what all ranks know of."""
        try:
            yield
        except NotFinite as error:
            self._save(error.step)
            raise AgreedError(
                f"{error}. The weights before this step are saved in {self.out}"
            ) from None

    def _between_steps(
        self, step: int, last: int, stopped: bool, progress: Progress
    ) -> Result | None:
        """What is due after `step` steps: a comparison of replicas, an evaluation (returned), a
        checkpoint."""
        output, found = self.config.options.output, None
        if output.check_every and step % output.check_every == 0:
            with known_to_all():
                self.trainer.check_replicas()
        if not stopped and (step == last or (output.eval_every and step % output.eval_every == 0)):
            found = self._evaluate()
            if found is not None and step != last:
                progress.say(f"step {step}: {found.describe()}")
        if stopped or step == last or (output.save_every and step % output.save_every == 0):
            self._save(step)
        return found

    def _evaluate(self) -> Result | None:
        """The held-out loss; None where nothing is held out."""
        tokens = self.config.options.output.eval_tokens
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
                keep=self.config.options.output.keep,
            )
        self.saved_step = step

    def _resume(self, found: Path) -> int:
        """Fill weights and optimizer state from the checkpoint; returns the step to go on with."""
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
        difference = checkpoint.difference(before.key, self.key)
        self.log(f"resumed from {found} at step {step}")
        if difference:
            self.log(f"results continue to rounding, not bit for bit: {difference}")
        return step

    def _finish(
        self, step: int, seconds: float, stopped: bool, progress: Progress, found: Result | None
    ) -> None:
        """The totals, and a sample unless the run was interrupted."""
        self._save(step)
        self.metrics.close()
        if self.tracer is not None:
            self.tracer.write(self.out / "trace.json", self.comm)
            self.log(
                f"trace   {self.out / 'trace.json'}: a timeline of all ranks, to open in "
                "ui.perfetto.dev"
            )
        if step > self.first_step:
            steps = (
                f"steps {self.first_step + 1} to {step}"
                if self.first_step
                else plural(step, "step")
            )
            self.log(
                f"done    {steps} in {clock(seconds)}, {compact(progress.rate(step - 1))} "
                "tokens/s, at most "
                f"{peak_mb(self.comm, self.device)} MB per rank"
            )
            self.log(f"time    {self.shares.summary(self.comm)}")
        if stopped:
            self.log(f"stopped at step {step} as asked; go on with --resume {self.out}")
            return
        if found is not None:
            self.log(f"result  {found.summary()}")
        self.log(
            f"saved   {self.out}; write text with: python -m minillm.generate --checkpoint "
            f"{self.out}"
        )
        if self.config.options.output.sample_tokens:
            self._sample()

    def _sample(self) -> None:
        """Show what the model writes, from one token of the held-out text on. One data-parallel
        replica does it."""
        if self.trainer.mesh.coord("dp") == 0:
            prompt = [
                int(token)
                for token in (
                    self.corpus.held_out if len(self.corpus.held_out) else self.corpus.train
                )[:1]
            ]
            sampling = Sampling(
                temperature=SAMPLE_TEMPERATURE, seed=self.config.options.optimization.seed
            )
            ids = Generator(self.trainer.model).generate(
                prompt, self.config.options.output.sample_tokens, sampling
            )
            self.log(
                f"\n--- a sample at temperature {SAMPLE_TEMPERATURE} "
                f"---\n{self.corpus.tokenizer.decode(prompt + ids)}\n---"
            )
        self.comm.barrier()


def _prepare_out(rank: int, config: ResolvedConfig, found: Path | None) -> Path:
    """The run's folder, made and tried by the first rank. A new run never writes into the folder of
    another."""
    asked = config.options.output.out
    if found is not None and asked is None:
        return found.parent.parent if found.parent.name == checkpoint.SUBFOLDER else found.parent
    path = Path(config.out)
    if rank:
        return path
    if found is None and _holds_run(path):
        if asked is not None:
            raise ConfigError(
                f"--out {path} holds an earlier run; continue it with --resume {path}, or choose "
                "another folder"
            )
        path = next(
            p for n in range(2, 10_000) if not _holds_run(p := path.with_name(f"{path.name}-{n}"))
        )
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--out {path} is not writable; choose another folder")
    (path / "config.toml").write_text(to_toml(config.filled()))
    return path


def _holds_run(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / checkpoint.SUBFOLDER).exists()


if __name__ == "__main__":
    sys.exit(main())
