"""Train a model: `python -m minillm.train`, or `mpirun -n 4 python -m minillm.train --tp 2`.

Reads the options, loads the data, runs the loop of training/loop.py, and shows a sample at the end.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from minillm import kernels
from minillm.base.device import CPU, open_device
from minillm.base.errors import ConfigError
from minillm.base.flags import to_toml
from minillm.base.log import Log, paragraph
from minillm.base.terminal import guarded_output
from minillm.base.trace import Tracer
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.launchers import OPEN_MPI_STOP, launched
from minillm.comm.ledger import recording
from minillm.comm.process import LeftOver, run_new_rank, run_program
from minillm.comm.recorder import FlightRecorder
from minillm.comm.signals import StopRequest
from minillm.comm.two_levels import neighbours
from minillm.inference.sample import SAMPLES
from minillm.inference.written import held_out_scores
from minillm.replication.server import Server
from minillm.tasks.protocol import Dataset, Written
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.config import RunConfig, decided, preset_values
from minillm.training.early_stopping import EarlyStopping
from minillm.training.fit import fit
from minillm.training.folder import Claim, check_visible, claim_existing, claim_new
from minillm.training.going_on import NEW_RANK
from minillm.training.joining import join
from minillm.training.loop import Run
from minillm.training.numeric_key import asked_kernels
from minillm.training.origin import Origin, continued_run, saved_options
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.serving import make_server, with_servers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    if (sys.argv[1:] if argv is None else list(argv)) == [NEW_RANK]:
        return run_new_rank(lambda comm: join(comm, _show_texts))
    return run_program(
        lambda words: parse_train_args(words, saved=saved_options),
        train,
        argv,
        lambda given: given[1].compute.threads,
    )


def train(comm: Communicator, given: tuple[StartOptions, RunConfig]) -> Communicator | None:
    """Run the training that the options describe. Collective.

    Returns the ranks that are left at its end, if some may be lost.
    """
    start, options = given
    comm.timeout = options.comm.comm_timeout
    on, log = options.compute.device, Log(comm.rank)
    local_rank = comm.split_by_node().rank
    device = CPU if start.print_config else agree(comm, lambda: open_device(on, local_rank))
    with ExitStack() as stack:
        stack.callback(gc.enable)  # the loop disables it, and may fail
        run = from_first(comm, lambda: _text(continued_run(start, options.output.out)))
        if run is not None and not start.print_config:
            # Owned before its newest checkpoint is looked for: no other job can add one.
            _own(comm, stack, lambda: claim_existing(Path(run)))
        with known_to_all():
            origin = Origin.find(comm, start)
        data, config = _plan(comm, options, origin)
        with known_to_all():
            config = fit(config, comm, device, refuse=not start.print_config)
        if start.print_config:
            shown = config.filled()
            if options.compute.device == "cuda":  # decided by the memory of a GPU, not opened here
                shown = shown.replace(recompute=options.pipeline.recompute)
            if start.resume is not None:  # the folder is that of the run
                shown = shown.replace(out=options.output.out)
            usual = RunConfig.from_dict(preset_values(options.preset)).to_dict()
            del usual["preset"]  # is always shown as given
            log(to_toml(options, shown, usual).rstrip())
            return None
        if origin is not None and (nothing := _nothing_left(origin, config)):
            log(nothing)
            return None
        asked, default = options.output.out, config.out
        out = Path(run) if run else _own(comm, stack, lambda: claim_new(asked, default))
        comm = on_device(comm, device)
        tracer = Tracer(comm.rank) if options.output.trace else None
        stack.enter_context(kernels.use(**asked_kernels(comm, options.compute, device)))
        book = stack.enter_context(
            recording(
                check_order=options.comm.check_order,
                on_event=tracer.communication if tracer else None,
            )
        )
        book.dump = FlightRecorder(book, out, comm.rank).dump
        stop = StopRequest(announces=comm.rank == 0, report=book.dump)
        stack.enter_context(stop.listening())
        stack.enter_context(
            guarded_output(lambda error: stop.ask(f"standard output is lost ({error.strerror})"))
        )

        left: list[Communicator] = []

        def work(workers: Communicator, wire: Communicator | None) -> None:
            training = Run(workers, device, config, data, out, origin, tracer, stop, wire)
            if (launch := launched()) and launch.launcher.startswith("Open MPI"):
                words = f"Ctrl-C under this MPI ends a run unsaved; {OPEN_MPI_STOP}"
                log(f"{paragraph('stop', words)}\n")
            stack.callback(training.release)
            if training.train():
                _show_texts(training)
            left.append(LeftOver() if training.left else training.comm)

        def serving(wire: Communicator, config: ResolvedConfig) -> Server:
            server = make_server(wire, config)
            server.record(out, wire.rank - config.mesh.num_ranks, tracer)
            return server

        with_servers(comm, config, work, serving)
        if tracer is not None:
            path, cut = out / "trace.json", ", without the last steps" if tracer.dropped else ""
            tracer.write(path, comm)
            log(f"trace   {path}: a timeline of all ranks{cut}, to open in ui.perfetto.dev")
    return left[0] if options.comm.on_failure != "stop" else None


def _own(comm: Communicator, stack: ExitStack, claim: Callable[[], Claim]) -> Path:
    """Claim a folder on rank 0 until `stack` closes, and return it on all ranks. Collective.

    Raises ConfigError on every rank if another job owns it, or if one rank cannot write there.
    """

    def on_first() -> list[str | None]:
        found = claim()
        stack.enter_context(found.lock)
        return [str(found.path), found.note]

    path, note = from_first(comm, on_first)
    if note is not None:
        Log(comm.rank)(note)
    agree(comm, lambda: check_visible(Path(path)))
    return Path(path)


def _nothing_left(origin: Origin, config: ResolvedConfig) -> str | None:
    """Return the line that ends a resumed run without a step to do; None if there are some."""
    output, step = config.options.output, origin.step
    steps = config.options.optimization.steps
    stopping = EarlyStopping(output.patience, origin.stopping(config.options))
    if origin.continues and stopping.over:
        return (
            f"{origin.path} is the end of its run: {stopping.describe()}; to train longer, pass a "
            f"larger one, as in: --resume {origin.run or origin.path} --patience "
            f"{2 * stopping.waited}"
        )
    if not origin.continues or step < min(steps, output.stop_after or steps):
        return None
    name, number = ("--stop-after", output.stop_after) if step < steps else ("--steps", steps)
    return (
        f"{origin.path} is of step {step}, so nothing is left to do for {name} {number}; to train "
        f"longer, pass a larger one, as in: --resume {origin.run or origin.path} {name} {2 * step}"
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _plan(
    comm: Communicator, options: RunConfig, origin: Origin | None
) -> tuple[Dataset, ResolvedConfig]:
    """Return the data and the resolved configuration, checked before anything is allocated.

    Collective. Raises ConfigError on every rank.
    """
    with known_to_all():
        vocabulary = None if origin is None else origin.record.tokenizer
        data = options.objective.load(options.corpus, options.shape, vocabulary, comm)
        if (patience := options.output.patience) is not None and not data.num_held_out:
            raise ConfigError(
                f"--patience {patience} needs held-out data, but {data.source} holds nothing out; "
                "name some, or leave it out"
            )
        options = decided(options, data)
        config = resolve(options, comm.size, data.vocab_size, neighbours(comm))
        if options.comm.on_failure != "stop":
            _check_survivable(comm, options.comm.on_failure)
    return data, config


def _check_survivable(comm: Communicator, asked: str) -> None:
    try:
        comm.check_survivable()
    except ConfigError as error:
        raise ConfigError(f"--on-failure {asked}: {error}") from None


def _show_texts(run: Run) -> None:
    """Show what the trained model writes and its scores, if its family and options ask for them.

    The first replica writes. Collective.
    """
    output, data = run.config.options.output, run.data
    sample = SAMPLES.get(run.config.family.writes) if output.sample_tokens else None
    scored = isinstance(data, Written) and min(data.num_scored, len(data.references(None)))
    if sample is None and not scored:
        return
    comm, log, number = run.comm, Log(run.comm.rank), run.trainer.replication.replica
    model, stop = run.trainer.model, run.stop.asked
    replica = comm.split(number, name="replica")
    if replica is not None and number == 0:
        with comm.working("writing texts"), run.trainer.replication.agreed():
            if sample is not None:
                seed = run.config.options.optimization.seed
                log(sample(model, data, output.sample_tokens, seed, replica, stop))
            if isinstance(data, Written) and scored:
                found = held_out_scores(model, data, replica, stop, run.heartbeat.beat)
                if found is not None:
                    log(paragraph("scores", found))
    comm.barrier()


if __name__ == "__main__":
    sys.exit(main())
