"""Speed of data-parallel methods beside one another: `mpirun -n 2 minillm bench methods`.

Each method in turn trains the same model for a few steps in the same processes, so that a slow
minute of the machine meets all of them. Ratios to the first method are paired by round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.bench.compare import CompareConfig, chosen, with_method
from minillm.bench.contest import NOTE, Contestant, advantage
from minillm.bench.shapes import CONFIGS, Shape
from minillm.bench.synthetic import random_task
from minillm.bench.timing import ForeignLoad, write_json
from minillm.comm.agreement import AgreedError, known_to_all
from minillm.comm.communicator import Communicator
from minillm.kernels.gpu_check.report import table
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.serving import with_servers
from minillm.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class MethodsBench(Record):
    """Time data-parallel methods in turns, on the ranks of mpirun."""

    config: Literal["c1", "c2", "c3", "g2"] = "c2"
    """Sizes, as of the benchmark train. The batch is that of all ranks."""
    methods: str | None = None
    """Methods of `minillm compare`, separated by commas; ratios are to the first one. Default: all
    that this machine can run."""
    workers: int = option(0, at_least=0)
    """Ranks that train by the methods without dedicated servers; 0: all. With `mpirun -n 3` and
    --workers 2, a server stands beside the two workers of every method."""
    rounds: int = option(10, at_least=1)
    """Turns of each method."""
    steps: int = option(5, at_least=1)
    """Steps in a turn."""
    json: str | None = None
    """File to write the results to."""


class Method(Contestant):
    """Data-parallel method in turns. Its runs are collective over `comm`."""

    def __init__(
        self, name: str, comm: Communicator, config: ResolvedConfig, shape: Shape, steps: int
    ) -> None:
        super().__init__(name, ())
        self.comm, self.config, self.shape, self.steps = comm, config, shape, steps
        ranks = config.mesh.num_ranks + config.options.replication.num_servers
        self._group = comm if ranks == comm.size else comm.split(0 if comm.rank < ranks else None)

    def measured(self) -> dict[str, Any]:
        """Return the mean seconds of a step in one turn, and the share of the cores of others."""
        found: list[float] = []
        with ForeignLoad() as load:
            if self._group is not None:
                with_servers(
                    self._group,
                    self.config,
                    lambda workers, wire: found.append(self._train(workers, wire)),
                )
            self.comm.barrier()
        gc.collect()
        own = sum(self.comm.gather_json(load.own))
        times = [rank[0] for rank in self.comm.gather_json(found) if rank]
        share = self.comm.broadcast_json(load.share_of(load.wall, load.busy, own))
        return {"step": [max(times)], "foreign": share}

    def _train(self, workers: Communicator, wire: Communicator | None) -> float:
        """Return the seconds of a step. The first one allocates, and is not counted."""
        trainer = Trainer(self.config, workers, random_task(self.shape), wire=wire)
        trainer.step(0)
        trainer.replication.meet()
        workers.barrier()
        start = time.perf_counter()
        for step in range(self.steps):
            trainer.step(1 + step)
        trainer.replication.meet()
        workers.barrier()
        return (time.perf_counter() - start) / self.steps


def run(comm: Communicator, options: MethodsBench) -> None:
    """Train by every method in turns; the first rank prints the table. Collective."""
    if comm.size == 1:
        raise ConfigError(
            "bench methods needs several ranks: mpirun -n 2 python -m minillm.bench methods"
        )
    shape, field, skipped = CONFIGS[options.config], [], []
    with known_to_all():
        names = chosen(options.methods)
        if options.workers > comm.size:
            raise ConfigError(f"--workers {options.workers} is more than the {comm.size} ranks")
    for name in names:
        try:
            config = _resolved(name, shape, options, comm.size)
        except ConfigError as error:  # the same on every rank
            if options.methods is not None:
                raise AgreedError(f"{name}: {error}") from None
            skipped.append(f"{name} is left out: {error}")
            continue
        field.append(Method(name, comm, config, shape, options.steps))
    for _ in range(options.rounds):
        for one in field:
            one.take_round()
    if comm.rank:
        return
    print(f"{options.config}: {shape}, {comm.size} ranks, {options.rounds} turns, float32")
    header = ("method", "ms a step", "tokens/s", f"time over {field[0].name}", "95 %")
    print(table(header, [_row(one, field[0], shape.tokens) for one in field]))
    for line in [*skipped, *([NOTE] if any(one.mark for one in field) else [])]:
        print(line)
    found = {one.name: one.runs for one in field}
    write_json(options.json, {"options": vars(options), "ranks": comm.size, "runs": found})


def _resolved(name: str, shape: Shape, options: MethodsBench, num_ranks: int) -> ResolvedConfig:
    """Return the configuration of a method. Raises ConfigError if the ranks cannot run it."""
    sizes = shape._asdict()
    vocab = sizes.pop("vocab")
    given = CompareConfig().replace(**sizes, steps=2 * options.steps)
    config = with_method(given, name, num_ranks)
    if not config.replication.num_servers:
        num_ranks = options.workers or num_ranks
    return resolve(config, num_ranks, vocab)


def _row(one: Method, first: Method, tokens: int) -> Sequence[str]:
    seconds = float(np.nanmedian(one.medians("step")))
    return [
        one.name,
        f"{seconds * 1e3:.1f}{one.mark}",
        f"{tokens / seconds:.0f}",
        *advantage(first, one, "step"),
    ]
