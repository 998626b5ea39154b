"""Speed of data-parallel methods beside one another: `mpirun -n 2 minillm bench methods`.

All methods train the same model in the same processes, a few steps each in turn, so that a slow
minute of the machine meets all of them. Ratios to the first method are paired by round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from minillm.base.device import CPU
from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.bench.compare import CompareConfig, chosen, with_method
from minillm.bench.contest import NOTE, Contestant, advantage
from minillm.bench.shapes import CONFIGS
from minillm.bench.synthetic import random_trainer
from minillm.bench.timing import ForeignLoad, write_json
from minillm.comm.agreement import AgreedError, known_to_all
from minillm.comm.communicator import Communicator
from minillm.kernels.gpu_check.report import table
from minillm.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class MethodsBench(Record):
    """Time data-parallel methods in turns, on the ranks of mpirun."""

    config: Literal["c1", "c2", "c3", "g2"] = "c2"
    """Sizes, as of the benchmark train. The batch is that of all ranks."""
    methods: str | None = None
    """Methods of `minillm compare`, separated by commas; ratios are to the first one. Default: all
    that this machine can run."""
    rounds: int = option(10, at_least=1)
    """Turns of each method."""
    steps: int = option(5, at_least=1)
    """Steps in a turn."""
    json: str | None = None
    """File to write the results to."""


@dataclass
class Method(Contestant):
    """Data-parallel method with its trainer on this rank. Its runs are collective."""

    trainer: Trainer | None = field(default=None, repr=False)
    steps: int = 1
    done: int = 0

    def measured(self) -> dict[str, Any]:
        """Return the mean seconds of a step in one turn, and the share of the cores of others."""
        assert self.trainer is not None
        world = self.trainer.world
        world.barrier()
        with ForeignLoad() as load:
            start = time.perf_counter()
            for _ in range(self.steps):
                self.trainer.step(self.done)
                self.done += 1
            world.barrier()
            seconds = time.perf_counter() - start
        ranks = world.gather_json([load.wall, load.busy, load.own])
        foreign = load.share_of(ranks[0][0], ranks[0][1], sum(rank[2] for rank in ranks))
        return {"step": [float(world.broadcast_json(seconds)) / self.steps], "foreign": foreign}


def run(comm: Communicator, options: MethodsBench) -> None:
    """Train by every method in turns; the first rank prints the table. Collective."""
    if comm.size == 1:
        raise ConfigError(
            "bench methods needs several ranks: mpirun -n 2 python -m minillm.bench methods"
        )
    field, skipped = [], []
    with known_to_all():
        names = chosen(options.methods)
    for name in names:
        try:
            field.append(_method(comm, name, options))
        except ConfigError as error:  # the same on every rank
            if options.methods is not None:
                raise AgreedError(f"{name}: {error}") from None
            skipped.append(f"{name} is left out: {error}")
    gc.disable()
    for one in field:
        one.measured()  # allocates, and learns the order of blocks
    for _ in range(options.rounds):
        for one in field:
            one.take_round()
    if comm.rank:
        return
    shape = CONFIGS[options.config]
    print(f"{options.config}: {shape}, {comm.size} ranks, {options.rounds} turns, float32")
    header = ("method", "ms a step", "tokens/s", f"time over {field[0].name}", "95 %")
    print(table(header, [_row(one, field[0], shape.tokens) for one in field]))
    for line in [*skipped, *([NOTE] if any(one.mark for one in field) else [])]:
        print(line)
    found = {one.name: one.runs for one in field}
    write_json(options.json, {"options": vars(options), "ranks": comm.size, "runs": found})


def _method(comm: Communicator, name: str, options: MethodsBench) -> Method:
    total = options.steps * (options.rounds + 1)
    config = with_method(CompareConfig().replace(steps=total), name)
    changes = config.replication.to_dict() | {"steps": total}
    trainer = random_trainer(comm, CPU, CONFIGS[options.config], **changes)
    return Method(name, (), trainer=trainer, steps=options.steps)


def _row(one: Method, first: Method, tokens: int) -> Sequence[str]:
    seconds = float(np.nanmedian(one.medians("step")))
    return [
        one.name,
        f"{seconds * 1e3:.1f}{one.mark}",
        f"{tokens / seconds:.0f}",
        *advantage(first, one, "step"),
    ]
