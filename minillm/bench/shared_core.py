"""Speed of training while another process keeps a core busy, relative to a quiet machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minillm.base.record import Record, option
from minillm.bench.timing import interval
from minillm.bench.training_step import TrainBench
from minillm.comm.communicator import Communicator

_BUSY = [sys.executable, "-c", "while True: pass"]


@dataclass(frozen=True, kw_only=True)
class SharedCoreBench(Record):
    """Train beside a process that keeps one core busy, and alone, in turns."""

    config: Literal["c1", "c2", "c3", "g2"] = "c1"
    """Sizes, as of the benchmark train."""
    ranks: int = option(1, at_least=1)
    """Data-parallel ranks that share the threads."""
    rounds: int = option(10, at_least=2)
    """Pairs of turns."""
    seconds: float = 2.0
    """Length of a turn, without starting and warming up."""


def run(comm: Communicator, options: SharedCoreBench) -> None:
    """Measure and print the times of a step and the relative speed."""
    bench = TrainBench(config=options.config, ranks=options.ranks, seconds=options.seconds)
    (case,) = bench.cases()
    own = bench.field(case)[0]
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(options.rounds):
        alone.append(float(np.median(own.run()["step"])))
        busy = subprocess.Popen(_BUSY)
        try:
            beside.append(float(np.median(own.run()["step"])))
        finally:
            busy.kill()
            busy.wait()
    ratios = np.divide(alone, beside).tolist()
    low, high = interval(ratios)
    print(f"{case.label}: {own.name}, {options.rounds} rounds")
    print(f"alone                {np.median(alone) * 1e3:8.1f} ms a step")
    print(f"beside a busy process{np.median(beside) * 1e3:8.1f} ms a step")
    print(f"relative speed       {np.median(ratios):8.2f} ({low:.2f}-{high:.2f})")
