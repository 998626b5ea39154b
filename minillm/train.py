"""Train a GPT: `python -m minillm.train`, or `mpirun -n 4 python -m minillm.train --tp 2`.

Reads the options, loads the text, runs the loop of training/loop.py, and shows a sample at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from minillm import checkpoint, kernels
from minillm.base.device import CPU, Device, open_device
from minillm.base.errors import ConfigError
from minillm.base.flags import to_toml
from minillm.base.log import Log
from minillm.base.options import ComputeOptions
from minillm.base.trace import Tracer
from minillm.comm.agreement import agree, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.ledger import recording
from minillm.comm.process import run_program
from minillm.comm.signals import StopRequest
from minillm.data.corpus import Corpus, load_corpus
from minillm.data.tokenizers import tokenizer_from_json
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.config import RunConfig
from minillm.training.loop import Run
from minillm.training.resolve import ResolvedConfig, resolve

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
        if run.train() and options.output.sample_tokens:
            if run.trainer.mesh.coord("dp") == 0:
                with comm.working("writing a sample"):
                    run.log(_sample(run))
            comm.barrier()


def _kernel_choices(compute: ComputeOptions, device: Device) -> dict[str, str]:
    """Return op -> the kernel that --kernels names. Raises ConfigError if it cannot run here."""
    try:
        choices = kernels.choices_from(compute.kernels)
        with kernels.use(**choices):
            for op in kernels.ops():
                kernels.chosen(op, device.like(op, compute.dtype))
    except kernels.KernelUnavailable as error:
        raise ConfigError(f"--kernels {compute.kernels}: {error}") from None
    return choices


def _saved_values(path: str) -> dict[str, Any]:
    """Return the flat configuration of the run whose checkpoint lies at `path`."""
    return dict(checkpoint.RunRecord.read(checkpoint.find(Path(path))).config)


def _plan(
    comm: Communicator, options: RunConfig, found: Path | None
) -> tuple[Corpus, ResolvedConfig]:
    """Return the text and the resolved configuration, checked before anything is allocated.

    Collective. Raises ConfigError on every rank.
    """
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


def _sample(run: Run) -> str:
    """Return what the model writes after one token of the held-out text."""
    corpus, options = run.corpus, run.config.options
    prompt = [int((corpus.held_out if len(corpus.held_out) else corpus.train)[0])]
    sampling = Sampling(temperature=SAMPLE_TEMPERATURE, seed=options.optimization.seed)
    generator = Generator(run.trainer.model, corpus.tokenizer.vocab_size)
    ids = generator.generate(prompt, options.output.sample_tokens, sampling)
    text = corpus.tokenizer.decode(prompt + ids)
    return f"\n--- a sample at temperature {SAMPLE_TEMPERATURE} ---\n{text}\n---"


if __name__ == "__main__":
    sys.exit(main())
