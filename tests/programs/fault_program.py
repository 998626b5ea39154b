"""Training run in which one rank fails: `fault_program.py NAME RANK [options of minillm.train]`.

`spike` takes the number of a sequence instead of a rank.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm import train
from minillm.base.metrics_file import MetricsFile
from minillm.comm.communicator import Communicator
from minillm.data import corpus
from minillm.models.protocol import Batch
from minillm.replication.server import Server
from minillm.tasks.language_model import LanguageModeling
from minillm.training import loop
from minillm.training.step import StepReport
from minillm.training.trainer import Trainer

STEP = 3  # at which a rank fails in mid-step
FILE_LIMIT = 20_000  # bytes: enough for metrics, too little for a checkpoint


def in_mid_step(fail: Callable[[], None], rank: int) -> None:
    """Call `fail` on `rank` in step STEP, while the other ranks go on to their communication."""
    usual = Trainer.step

    def step(self: Trainer, number: int) -> StepReport:
        if number == STEP and self.world.rank == rank:
            fail()
        return usual(self, number)

    Trainer.step = step  # type: ignore[method-assign]


def before_a_line(rank: int) -> None:
    """Kill `rank` of Open MPI when it is to write a line, which all others have settled."""
    usual, started = MetricsFile.write, os.environ["OMPI_COMM_WORLD_RANK"]

    def write(self: MetricsFile, **values: Any) -> None:
        if values["step"] == STEP and started == str(rank):
            time.sleep(1.0)  # until the others wait in the next step
            kill()
        usual(self, **values)

    MetricsFile.write = write  # type: ignore[method-assign]


def of_a_server(rank: int) -> None:
    """End a dedicated server when it answers the first pull."""
    usual = Server.answer

    def answer(self: Server, *args: Any) -> None:
        if self.wire.rank == rank:
            kill()
        usual(self, *args)

    Server.answer = answer  # type: ignore[method-assign]


def raise_() -> None:
    raise RuntimeError("a misfortune in mid-step")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def vanish(rank: int) -> None:
    """Remove the data file after the first rank has listed it and before a rank opens it."""
    usual = corpus.from_first
    source = Path(sys.argv[sys.argv.index("--data") + 1])

    def from_first(*args: Any) -> Any:
        plan = usual(*args)
        source.unlink(missing_ok=True)
        return plan

    corpus.from_first = from_first


def spike(position: int) -> None:
    """Make the loss of the batch that begins with this sequence large, on every rank."""
    usual = LanguageModeling.batch

    def batch(self: LanguageModeling, step: int, *args: Any) -> Batch:
        made = usual(self, step, *args)
        large = self.batches.position(step) == position
        divisors = {name: value / 1e3 for name, value in made.divisors.items()}
        return made._replace(divisors=divisors) if large else made

    LanguageModeling.batch = batch  # type: ignore[method-assign]


def hang() -> None:
    print("hangs", flush=True)
    time.sleep(600)


def tell(rank: int) -> None:
    """Print a line as an evaluation and the sample begin on `rank`."""
    measure, write = loop.measure, train.SAMPLES["text"]

    def measuring(model: Any, what: Any, world: Communicator, *args: Any) -> Any:
        if world.rank == rank:
            print("measures", flush=True)
        return measure(model, what, world, *args)

    def writing(*args: Any) -> str:
        print("writes", flush=True)
        return write(*args)

    loop.measure, train.SAMPLES["text"] = measuring, writing


def full() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))


FAULTS: dict[str, Callable[[int], None]] = {
    "raise": lambda rank: in_mid_step(raise_, rank),
    "kill": lambda rank: in_mid_step(kill, rank),
    "line": before_a_line,
    "server": of_a_server,
    "vanish": vanish,
    "hang": lambda rank: in_mid_step(hang, rank),
    "tell": tell,
    "full": lambda rank: in_mid_step(full, rank),
    "spike": spike,
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]](int(sys.argv[2]))
    sys.exit(train.main(sys.argv[3:]))
