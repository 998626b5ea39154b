"""Verify a layout: `mpirun -n 4 python -m minillm.verify --tp 2 --pp 2` with the flags of train.

Runs some steps of the configuration on one rank and on the mesh, and compares losses, gradients and
weights. Exits with 0 only if rounding explains every difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from minillm.base.device import open_device
from minillm.base.flags import TrainArgs, parse_train_args
from minillm.base.log import Log
from minillm.comm.agreement import agree, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.process import run_program
from minillm.comm.single import SelfCommunicator
from minillm.data.batches import Batches
from minillm.data.corpus import load_corpus
from minillm.tasks.language_model import LanguageModeling
from minillm.training.comparison import Course, pieces, run, whole
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer

SHOWN = 5  # deviations in the report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 1 if the results differ."""
    return run_program(parse_train_args, _verify, argv)


def _verify(comm: Communicator, args: TrainArgs) -> None:
    train = args.train_config()
    with known_to_all():
        corpus = load_corpus(
            train.data, train.tokenizer, context=train.context, vocab=train.vocab, comm=comm
        )
        config = resolve(train, comm.size, corpus.vocab_size)
    steps = min(STEPS, train.steps)
    log = Log(comm.rank)
    device = agree(comm, lambda: open_device(train.device, comm.split_by_node().rank))

    def course(world: Communicator, config: ResolvedConfig, device: Device) -> Course:
        batches = Batches(corpus.train, config.model.context, config.train.batch, config.train.seed)
        trainer = Trainer(config, world, LanguageModeling(batches), device=device)
        keep = pieces if world is comm else whole
        return run(trainer, steps, keep(trainer))

    truth = own = None
    if comm.rank == 0:
        alone = dataclasses.replace(train, **ONE_RANK)
        exact = dataclasses.replace(alone, dtype="float64", device="cpu")
        log(f"one rank, float64: {plural(steps, 'step')}")
        truth = course(SelfCommunicator(), resolve(exact, 1, corpus.vocab_size), CPU)
        log(f"one rank, {train.dtype}")
        own = course(SelfCommunicator(), resolve(alone, 1, corpus.vocab_size), device)
    log(f"mesh of {comm.size}: dp {config.dp} x tp {config.tp} x pp {config.pp}")
    mesh = course(on_device(comm, device), config, device)
