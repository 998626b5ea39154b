"""Alternating runs of contestants, each in a process of its own.

A slow minute of a shared machine meets all contestants, and ratios are paired by round. A
contestant is a command that prints the seconds of its measurements as one line of JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minillm.base.errors import ConfigError, MinillmError
from minillm.base.record import Record, option
from minillm.bench.timing import FOREIGN_LIMIT, ForeignLoad, interval, write_json
from minillm.comm.communicator import Communicator
from minillm.comm.cores import usable_cores
from minillm.kernels.gpu_check.report import table

PACKAGES = {"torch": "torch", "llama.cpp": "xllamacpp"}  # yardstick -> package that has it
TRIES = 3  # runs in a round while other processes use the machine
MARK = "*"  # behind a number whose rounds were all disturbed
NOTE = (
    f"{MARK} other processes used more than {FOREIGN_LIMIT:.0%} of the cores in every round: the "
    "times are upper bounds"
)


def command(module: str, part: str, options: Mapping[str, Any]) -> list[str]:
    """Return the command that measures `part` of a model by a module of this folder."""
    return [sys.executable, "-m", f"minillm.bench.{module}", part, json.dumps(options)]


@dataclass
class Contestant:
    """Command under comparison and the output of its runs.

    `foreign` in a run is the share of the cores that other processes took. Above FOREIGN_LIMIT the
    run is disturbed. It counts only if all are.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def run(self, timeout: float | None = None) -> dict[str, Any]:
        """Run the command and return its output. Raises MinillmError if the command fails."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            self.command, env=environment, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise MinillmError(
                f"{self.name} ended with status {done.returncode}: {done.stderr.strip()[-800:]}"
            )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def take_round(self) -> None:
        """Append one run: the first that is undisturbed, or the least disturbed of three."""
        tries: list[dict[str, Any]] = []
        while len(tries) < TRIES and not (tries and _is_quiet(tries[-1])):
            tries.append(self.measured())
        self.runs.append(min(tries, key=lambda run: run["foreign"]))

    def measured(self) -> dict[str, Any]:
        """Return the output of a run, and what share of the cores others took meanwhile."""
        with ForeignLoad() as load:
            found = self.run()
        return found | {"foreign": load.share}

    @property
    def mark(self) -> str:
        """The mark of numbers from disturbed runs, empty if a run is undisturbed."""
        return "" if any(map(_is_quiet, self.runs)) else MARK

    def _counts(self, run: dict[str, Any]) -> bool:
        return _is_quiet(run) or bool(self.mark)

    def medians(self, measure: str) -> list[float]:
        """Return the median seconds of `measure` in each round, NaN if it does not count."""
        return [
            float(np.median(run[measure])) if self._counts(run) else np.nan for run in self.runs
        ]

    def number(self, name: str) -> list[float]:
        """Return a number that each run which counts has printed."""
        return [run[name] for run in self.runs if self._counts(run)]


def _is_quiet(run: dict[str, Any]) -> bool:
    return run["foreign"] <= FOREIGN_LIMIT


def advantage(own: Contestant, other: Contestant, measure: str) -> tuple[str, str]:
    """Return how many times faster `own` is and the 95 % interval as cells, paired by round."""
    ratios = np.divide(other.medians(measure), own.medians(measure))
    ratios = ratios[~np.isnan(ratios)]
    if own is other or not len(ratios):
        return "", ""
    low, high = interval(ratios.tolist())
    return f"{np.median(ratios):.2f}{own.mark or other.mark}", f"{low:.2f}-{high:.2f}"


@dataclass(frozen=True)
class Case:
    """One size of a benchmark: options of a run and the work in each time that it measures."""

    label: str
    options: Mapping[str, Any]
    amounts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Contest(Record, ABC):
    """Comparison of minillm with PyTorch. Subclasses give the cases and the columns."""

    against: Literal["none", "torch"] = "none"
    """Yardstick."""
    threads: int = 0
    """Threads in all; 0: one for each core."""
    rounds: int = option(5, at_least=1)
    """Runs of each contestant."""
    seconds: float = 1.0
    """Length of a measurement, without starting and warming up."""
    json: str | None = None
    """File to write the results to."""

    @property
    def num_threads(self) -> int:
        """The threads of each contestant."""
        return self.threads or usable_cores()

    def title(self) -> str:
        """Return the first line of the output."""
        return f"{self.num_threads} threads, {self.rounds} rounds, float32"

    @abstractmethod
    def header(self) -> Sequence[str]:
        """Return the names of the columns before the peak memory."""

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """Return the sizes to measure."""

    @abstractmethod
    def field(self, case: Case) -> list[Contestant]:
        """Return the contestants at one size, minillm first."""

    @abstractmethod
    def rates(self, amount: float, seconds: float, own: Contestant) -> list[str]:
        """Return the cells between the milliseconds and the peak memory."""


def run(comm: Communicator, contest: Contest) -> None:
    """Run all contestants in alternation, print the table and write the JSON file."""
    rows: list[list[str]] = []
    results = []
    found = version(contest.against)
    print("\n".join([contest.title(), *([f"against {found}"] if found else [])]), flush=True)
    for case in contest.cases():
        field = contest.field(case)
        for number in range(contest.rounds):
            for one in field:
                one.take_round()
                last = one.runs[-1]
                seconds = float(np.median(last[list(case.amounts)[-1]]))
                note = f"{seconds * 1e3:9.2f} ms"
                if not _is_quiet(last):
                    note += f" {MARK} others used {last['foreign']:.0%} of the cores"
                print(f"round {number + 1}  {case.label:8s} {one.name:24s} {note}", flush=True)
        for measure, amount in case.amounts.items():
            rows += [_row(contest, case, measure, amount, one, field[0]) for one in field]
        results.append({"options": case.options, "runs": {one.name: one.runs for one in field}})
    header = (*contest.header(), "peak MB", "minillm is faster by", "95 %")
    print("\n" + table(header, rows))
    if any(MARK in cell for row in rows for cell in row):
        print(NOTE)
    options = dataclasses.asdict(contest)
    write_json(contest.json, {"options": options, "against": found, "results": results})


def _row(
    contest: Contest, case: Case, measure: str, amount: float, one: Contestant, own: Contestant
) -> list[str]:
    names = [f"{case.label} {measure}", one.name] if case.label else [one.name]
    seconds = float(np.nanmedian(one.medians(measure)))
    rates = contest.rates(amount, seconds, own)
    peak = f"{max(one.number('peak_rss')) / 1e6:.0f}"
    ms = f"{seconds * 1e3:.{2 if case.label else 1}f}{one.mark}"
    return [*names, ms, *rates, peak, *advantage(own, one, measure)]


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def version(against: str) -> str:
    """Return the package of a yardstick and its version, "" if there is none."""
    package = PACKAGES.get(against, "")
    try:
        return f"{package} {importlib.metadata.version(package)}" if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_torch(on_gpu: bool = False) -> None:
    """Raise ConfigError if PyTorch is not installed."""
    if not installed("torch"):
        where = "" if on_gpu else " --index-url https://download.pytorch.org/whl/cpu"
        raise ConfigError(f"--against torch needs PyTorch: pip install torch{where}")
