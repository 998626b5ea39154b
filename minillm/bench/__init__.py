"""Benchmarks: `minillm bench train`, `kernels`, `attention`, `head`, `generate` and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minillm.base.flags import parse_flags
from minillm.base.record import known_name
from minillm.bench import (
    contest,
    kernel_times,
    messages,
    methods,
    models,
    parts,
    shared_core,
    training_step,
)
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program

Run = Callable[[Communicator, Any], None]

BENCHMARKS: dict[str, tuple[type, Run]] = {
    "train": (training_step.TrainBench, contest.run),
    "models": (models.ModelsBench, contest.run),
    "kernels": (kernel_times.KernelBench, kernel_times.run),
    "attention": (parts.AttentionBench, contest.run),
    "head": (parts.HeadBench, contest.run),
    "generate": (parts.GenerateBench, contest.run),
    "comm": (messages.CommBench, messages.run),
    "methods": (methods.MethodsBench, methods.run),
    "shared": (shared_core.SharedCoreBench, shared_core.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(_parse, lambda comm, chosen: chosen[0](comm, chosen[1]), argv)


def _parse(argv: list[str]) -> tuple[Run, Any]:
    """Return the benchmark that the first word names, and its options."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minillm bench BENCHMARK [OPTIONS]\n")
        for name, (options, _) in BENCHMARKS.items():
            print(f"  {name:10s} {(options.__doc__ or '').splitlines()[0]}")
        print("\nminillm bench BENCHMARK --help lists the options of one.")
        raise SystemExit(0)
    options, run = BENCHMARKS[known_name(argv[0], BENCHMARKS, "benchmark")]
    return run, parse_flags(options, argv[1:], prog=f"python -m minillm.bench {argv[0]}")
