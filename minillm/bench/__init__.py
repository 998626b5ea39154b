"""Benchmarks: `python -m minillm.bench train`, `kernels`, `attention`, `head`, `generate` and
`comm`. What is compared takes turns in one run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from minillm.base.flags import parse_flags
from minillm.base.record import known_name
from minillm.bench import kernel_times, messages, parts, training_step
from minillm.comm.process import main_guard

BENCHMARKS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (training_step.TrainBench, training_step.run),
    "kernels": (kernel_times.KernelBench, kernel_times.run),
    "attention": (parts.AttentionBench, parts.run),
    "head": (parts.HeadBench, parts.run),
    "generate": (parts.GenerateBench, parts.run),
    "comm": (messages.CommBench, messages.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status."""
    return main_guard(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        about = "\n".join(
            f"  {name:10s} {(options.__doc__ or '').splitlines()[0]}"
            for name, (options, _) in BENCHMARKS.items()
        )
        print(
            f"usage: python -m minillm.bench BENCHMARK [options]\n\n{about}\n\nOptions of each: "
            "python -m minillm.bench BENCHMARK --help"
        )
        return 0
    options, run = BENCHMARKS[known_name(argv[0], BENCHMARKS, "benchmark")]
    run(parse_flags(options, argv[1:], prog=f"python -m minillm.bench {argv[0]}"))
    return 0
