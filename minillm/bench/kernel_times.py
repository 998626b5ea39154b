"""Times of every implementation of a training step's operations: `minillm bench kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minillm import kernels
from minillm.base.errors import ConfigError
from minillm.base.record import Record
from minillm.bench.timing import median_seconds, write_json
from minillm.comm.communicator import Communicator
from minillm.comm.cores import usable_cores
from minillm.kernels.gpu_check.report import table
from minillm.kernels.rate import Call, StepSizes, all_calls

CPU_BACKENDS = ("numpy", "c")  # the emulator is for the correctness of a CUDA kernel, not its speed


@dataclass(frozen=True, kw_only=True)
class KernelBench(Record):
    """Time every implementation of every operation of a training step."""

    rows: int = 2048
    """Tokens in a microbatch."""
    dim: int = 384
    """Width of the model."""
    context: int = 256
    """Length of the sequences."""
    vocab: int = 8192
    """Columns of the logits."""
    threads: int = 0
    """Threads; 0: one for each core."""
    only: str | None = None
    """Run only operations whose name contains this; left out: all."""
    json: str | None = None
    """File to write the results to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows % self.context or self.dim % 64:
            raise ConfigError(
                f"--rows {self.rows} must be a multiple of --context {self.context}, and --dim "
                f"{self.dim} one of 64"
            )


def run(comm: Communicator, args: KernelBench) -> None:
    """Time all implementations and print the table."""
    threads = args.threads or usable_cores()
    sizes = f"{args.rows} x {args.dim}, context {args.context}, vocabulary {args.vocab}"
    print(f"{sizes}, {threads} threads, float32", flush=True)
    with kernels.threads(threads):
        found: list[dict[str, Any]] = [
            dict(op=call.op, choice=choice, seconds=s, bytes=call.num_bytes, flops=call.flops)
            for call in all_calls(StepSizes(args.rows, args.dim, args.context, args.vocab))
            if (args.only or "") in call.op
            for choice, s in _times(call)
        ]
    rows = [
        [one["op"], one["choice"], f"{one['seconds'] * 1e3:.3f}", _rate(**one)] for one in found
    ]
    print(table(("operation", "implementation", "ms", "rate"), rows))
    write_json(args.json, {"threads": threads, "results": found})


def _times(call: Call) -> Iterator[tuple[str, float]]:
    """Yield the implementations that run on this machine's cores, with their seconds."""
    for kernel in kernels.available(call.op):
        if kernel.unavailable is None and kernel.backend in CPU_BACKENDS:
            with kernels.use(**{call.op: kernel.choice}):
                yield kernel.choice, median_seconds(call.call)


def _rate(seconds: float, bytes: float, flops: float, **_: Any) -> str:
    if flops:
        return f"{flops / seconds / 1e9:.0f} GFLOP/s"
    return f"{bytes / seconds / 1e9:.1f} GB/s"
