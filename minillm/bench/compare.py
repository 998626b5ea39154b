"""Compare data-parallel methods: `mpirun -n 4 minillm compare`, with the flags of train.

Each method trains the same model on the same data for some steps, in the same processes, one after
another. One table shows speed, time shares, bytes sent and held, and loss.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm import kernels
from minillm.base.device import Device, open_device
from minillm.base.errors import ConfigError
from minillm.base.log import Log, compact, plural
from minillm.base.record import Record, option
from minillm.comm.agreement import AgreedError, agree, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.ledger import Ledger, ledger, recording
from minillm.comm.process import run_program
from minillm.comm.two_levels import neighbours
from minillm.data.cache import write_json
from minillm.replication.costs import DataAxis
from minillm.replication.method import Extent
from minillm.replication.methods import METHODS, method_of, payload
from minillm.replication.options import ReplicationOptions
from minillm.replication.server import Server
from minillm.tasks.protocol import Dataset
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.assembly import layout_of
from minillm.training.batching import drawn
from minillm.training.config import RunConfig, decided
from minillm.training.costs import data_axis, held_bytes, server_axis
from minillm.training.memory import predicted, predicted_server
from minillm.training.numeric_key import asked_kernels
from minillm.training.report import TimeShares
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.serving import make_server, with_servers
from minillm.training.trainer import Trainer

ROWS = {row: (method, values) for method in METHODS for row, values in method.compared.items()}
HEAD = ("method", "tokens/s", "compute", "comm.", "wait", "sent, counted", "held, counted", "loss")
FOOT = """\
comm. is time in operations on data, wait in agreements and for stages of the pipeline. sent: MB a
step of the largest rank on the data axis, by formula and by the ledger; of node-shared, MB read.
held: MB of weights, gradients, optimizer state and the method's memory, by formula (at the peak of
a step, with the blocks that ZeRO 2 and 3 gather) and of the arrays kept between steps. loss: of the
last step, on the training text."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Record):
    """Methods to compare, as in `--methods all-reduce,zero3 --json found.json`."""

    methods: str | None = None
    """Methods, separated by commas, by their names in the table, as all-reduce. Default: all that
    this machine can run."""
    json: str | None = option(None, path=True)
    """File for the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunConfig):
    """Compare data-parallel methods: speed, bytes sent and held, and loss of a few steps."""

    compare: CompareOptions = field(default=CompareOptions())


@dataclass(frozen=True)
class Found:
    """Results of one method. Bytes are those of the largest rank, sent ones per step."""

    method: str
    tokens_per_second: float
    compute: float  # shares of time, means over the ranks
    communication: float
    waiting: float
    sent_predicted: float
    sent_counted: float
    held_predicted: int
    held_measured: int
    loss: float  # of the last step

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        shares = (self.compute, self.communication, self.waiting)
        return [
            self.method,
            compact(self.tokens_per_second),
            *(f"{share:.0%}" for share in shares),
            f"{self.sent_predicted / 1e6:.3f} {self.sent_counted / 1e6:.3f}",
            f"{self.held_predicted / 1e6:.2f} {self.held_measured / 1e6:.2f}",
            f"{self.loss:.4f}",
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(
        lambda words: parse_train_args(
            words, prog="python -m minillm.bench.compare", cls=CompareConfig, defaults={"steps": 30}
        ),
        _compare,
        argv,
        lambda given: given[1].compute.threads,
    )


def chosen(text: str | None) -> list[str]:
    """Return the methods that `--methods` names. Raises ConfigError for an unknown one."""
    names = list(ROWS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ROWS:
            raise ConfigError(f"--methods: unknown method {name!r}; choose from {', '.join(ROWS)}")
    return list(dict.fromkeys(names))


def with_method(config: CompareConfig, method: str, num_ranks: int = 1) -> CompareConfig:
    """Return `config` with the options of a method. Options of the other methods are left out."""
    layout, optimization = config.layout, config.optimization
    extent = Extent(optimization.steps, optimization.batch, num_ranks, layout.tp * layout.pp)
    given, default = config.replication, ReplicationOptions()
    found, values = ROWS[method]
    set_here = {name: value(extent) if callable(value) else value for name, value in values.items()}
    kept = {name: getattr(given, name) for name in ("bucket_mb", "balance", "slow_rank")}
    options = {**default.to_dict(), **kept, **set_here}
    asks = found.flag(ReplicationOptions(**options))
    taken = [name for name, needed in found.needs.items() if asks.startswith(needed)]
    taken += [found.option] if found.option and found.asked(given) else []
    changed = {name: getattr(given, name) for name in taken}
    options |= {name: v for name, v in changed.items() if v != getattr(default, name)}
    return config.replace(**options)


def _check(options: ReplicationOptions) -> None:
    """Raise ConfigError for a flag that chooses a method: `--methods` does.

    The size of a method whose row sets it by the number of steps may be given.
    """
    method = method_of(options)
    sized = any(callable(values.get(method.option or "")) for values in method.compared.values())
    given = "" if sized else method.flag(options)
    if options.node_shared == "off":
        given = "--node-shared off"
    if given:
        raise ConfigError(f"compare runs the methods of --methods; leave out {given}")


def _compare(comm: Communicator, given: tuple[StartOptions, CompareConfig]) -> None:
    config, log = given[1], Log(comm.rank)
    comm.timeout = config.comm.comm_timeout
    path = None if config.compare.json is None else Path(config.compare.json)
    with known_to_all():
        _check(config.replication)
        methods = chosen(config.compare.methods)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--json {path}: its folder does not exist; make it first")
        data = config.objective.load(config.corpus, config.shape, None, comm)
        config = decided(config, data)
        resolve(with_method(config, "all-reduce"), comm.size, data.vocab_size)
    local_rank = comm.split_by_node().rank
    device = agree(comm, lambda: open_device(config.compute.device, local_rank))
    choices, steps = asked_kernels(comm, config.compute, device), config.optimization.steps
    per_node = neighbours(comm)
    log(f"{plural(len(methods), 'method')} on {plural(comm.size, 'rank')}, {steps} steps each")
    results, skipped = [], []
    with kernels.use(**choices):
        for method in methods:
            started = time.perf_counter()
            try:
                asked = with_method(config, method, comm.size)
                resolved = resolve(asked, comm.size, data.vocab_size, per_node)
                found = measure(on_device(comm, device), resolved, method, data, device)
            except ConfigError as error:  # the same on every rank
                if config.compare.methods is not None:
                    raise AgreedError(f"{method}: {error}") from None
                skipped.append(f"{method} is left out: {error}")
                continue
            finally:
                gc.collect()
            results.append(found)
            log(f"  {method:<12} {time.perf_counter() - started:.1f} s")
    for line in ("", *table(results), "", FOOT, *skipped):
        log(line)
    if path is not None:
        record = {"ranks": comm.size, "steps": steps, "methods": [vars(f) for f in results]}
        agree(comm, lambda: write_json(path, record) if comm.rank == 0 else None)


def measure(
    comm: Communicator, config: ResolvedConfig, method: str, data: Dataset, device: Device
) -> Found:
    """Train by one method. Collective; every rank returns the same.

    The first step counts in the bytes alone, because it also allocates.
    """
    own: list[Any] = []
    serving: list[Server] = []

    def work(workers: Communicator, wire: Communicator | None) -> None:
        own.extend(_work(workers, wire, config, data, device))

    def make(wire: Communicator, config: ResolvedConfig) -> Server:
        serving.append(make_server(wire, config))
        return serving[0]

    with recording() as book:
        with_servers(comm, config, work, make)
        for server in serving:
            axis = server_axis(config, server, comm.rank - config.mesh.num_ranks)
            held = predicted_server(config, layout_of(config)).held
            kept = sum(shard.num_bytes for shard in server.shards)
            sent = _counted(book, {})
            own += [sent, _predicted_bytes(axis, config), held, kept, 0.0, [0.0, 0.0, 0.0], 0.0]
    everyone = comm.gather_json(own)
    most = [max(rank[i] for rank in everyone) for i in range(5)]
    total, moving, waiting = (sum(rank[5][i] for rank in everyone) for i in range(3))
    steps = config.options.optimization.steps
    return Found(
        method,
        tokens_per_second=config.tokens_per_step * max(1, steps - 1) / most[4],
        compute=max(0.0, 1 - (moving + waiting) / total),
        communication=moving / total,
        waiting=waiting / total,
        sent_predicted=most[1] / steps,
        sent_counted=most[0] / steps,
        held_predicted=most[2],
        held_measured=most[3],
        loss=everyone[0][6],
    )


MEETINGS = 2  # of workers that do not share every step: before the clock starts, and at the end


def _predicted_bytes(axis: DataAxis, config: ResolvedConfig) -> int:
    found = payload(axis, config.options.optimization.steps, MEETINGS)
    return sum(count for key, count in found.items() if _of_data(key[0]))


def _work(
    comm: Communicator,
    wire: Communicator | None,
    config: ResolvedConfig,
    data: Dataset,
    device: Device,
) -> list[Any]:
    """Train on one rank of the mesh; return bytes sent and held, seconds, time shares and loss."""
    optimization, shares = config.options.optimization, TimeShares()
    task, _ = drawn(config, data)
    steps, started, book = optimization.steps, 0.0, ledger()
    trainer = Trainer(config, comm, task, device=device, wire=wire)
    built = book.snapshot()
    for step in range(steps):
        if step == min(1, steps - 1):
            trainer.replication.meet()
            comm.barrier()
            started = time.perf_counter()
        before = book.snapshot()
        report = trainer.step(step)
        if step or steps == 1:
            shares.add(report, book.since(before))
    loss = report.loss
    device.synchronize()
    seconds = time.perf_counter() - started
    trainer.replication.meet()
    if not trainer.replication.lockstep:  # every worker has a loss of its own
        loss = comm.reduce_numbers([loss])[0] / comm.size
    sent, axis = _counted(book, built), data_axis(trainer)
    need = predicted(
        config, trainer.model.layout, trainer.mesh.coord("pp"), shared_by=axis.shared_by
    )
    parts = [shares.total, 0.0, 0.0]
    for name, each in shares.seconds.items():
        if name != "optimizer":
            parts[1 if name.startswith("communication") else 2] += each
    expected = _predicted_bytes(axis, config)
    return [sent, expected, need.held, held_bytes(trainer), seconds, parts, loss]


def _counted(book: Ledger, before: Any) -> int:
    """Return the bytes that the data axis moved since the snapshot `before`."""
    return sum(
        row.bytes
        for (axis, _, kind), row in book.since(before).items()
        if kind in ("payload", "window") and _of_data(axis)
    )


def _of_data(axis: str) -> bool:
    return axis.split()[0].split("+")[0] == "dp"


def table(results: Sequence[Found]) -> list[str]:
    """Return the lines of the table, at most 100 columns wide."""
    rows = [list(HEAD), *(found.cells() for found in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
