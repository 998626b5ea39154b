"""Benchmarks: `minillm bench train`, `kernels`, `attention`, `head`, `generate` and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minillm.base.flags import parse_program
from minillm.bench import (
    contest,
    kernel_times,
    messages,
    methods,
    models,
    parts,
    quality,
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
    "quality": (quality.QualityBench, quality.run),
    "shared": (shared_core.SharedCoreBench, shared_core.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(
        lambda words: parse_program(BENCHMARKS, words, prog="minillm bench", word="benchmark"),
        lambda comm, chosen: chosen[0](comm, chosen[1]),
        argv,
    )
