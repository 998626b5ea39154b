"""`python -m minillm.bench train`: the training step beside PyTorch's, in processes that take
turns."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.bench.shapes import CONFIGS, Shape
from minillm.bench.timing import table
from minillm.bench.turns import TUNED, Contestant, advantage, require_torch, take_turns
from minillm.comm.cores import usable_cores


@dataclass(frozen=True, kw_only=True)
class TrainBench(Record):
    """Time the training step of a GPT-2, on its own or beside PyTorch."""

    config: Literal["c1", "c2", "c3", "g2"] = "c2"
    """Sizes: c1 4x128 context 64, c2 6x384 context 256, c3 4x512 with 50304 tokens, g2 GPT-2
    124M."""
    layers: int | None = None
    """Number of blocks, instead of the configuration's; so with the next five."""
    heads: int | None = None
    """Number of heads."""
    dim: int | None = None
    """Width."""
    context: int | None = None
    """Length of the sequences."""
    batch: int | None = None
    """Sequences in a step."""
    vocab: int | None = None
    """Number of tokens."""
    against: Literal["none", "torch"] = "none"
    """What to compare with: torch runs eager and compiled, as it comes and well set (fused AdamW,
    allocator)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; bfloat16 on a GPU only, where PyTorch runs under
    autocast."""
    compile: bool = True
    """Run torch.compile too (its first step takes a minute)."""
    threads: int = 0
    """Threads in all; 0: one for each core."""
    ranks: int = option(1, at_least=1)
    """Data-parallel ranks that share the threads; several are compared with one process that has
    all of them."""
    rounds: int = option(5, at_least=1)
    """Turns of each contestant."""
    seconds: float = 3.0
    """Length of a turn, without starting and warming up."""
    json: str | None = None
    """File to write the results to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cpu" and self.dtype != "float32":
            raise ConfigError(f"--dtype {self.dtype} needs --device cuda")

    def shape(self) -> Shape:
        """The configuration with what was given instead."""
        given = {
            name: getattr(self, name) for name in Shape._fields if getattr(self, name) is not None
        }
        return CONFIGS[self.config]._replace(**given)


def contestants(args: TrainBench) -> list[Contestant]:
    """Ours first (several ranks, then one), then PyTorch's four."""
    shape, threads = args.shape(), args.threads or usable_cores()
    sizes = [f"--{name}={value}" for name, value in shape._asdict().items()]
    turn = [
        *sizes,
        f"--seconds={args.seconds}",
        "--warmup=3",
        f"--device={args.device}",
        f"--dtype={args.dtype}",
    ]
    on_gpu = args.device == "cuda"
    found = [_own(args, turn, args.ranks, threads)]
    if args.ranks > 1 and not on_gpu:
        found.append(_own(args, turn, 1, threads))  # as much of the machine, undivided
    if args.against == "torch":
        require_torch(on_gpu)
        yardstick = [sys.executable, "-m", "minillm.bench.torch_gpt", *turn, f"--threads={threads}"]
        limits = {"OMP_NUM_THREADS": str(threads)}
        for compiled in ([], ["--compile"])[: 2 if args.compile else 1]:
            kind = "compile" if compiled else "eager"
            # the allocator's settings are the host's, and fused AdamW is what a user of GPUs takes
            if on_gpu:
                found.append(Contestant(f"torch {kind}", [*yardstick, *compiled, "--fused"], {}))
                continue
            found.append(Contestant(f"torch {kind}", yardstick + compiled, limits))
            found.append(
                Contestant(
                    f"torch {kind}, tuned", [*yardstick, *compiled, "--fused"], limits | TUNED
                )
            )
    return found


def _own(args: TrainBench, turn: list[str], ranks: int, threads: int) -> Contestant:
    """minillm on `ranks` ranks that share the threads."""
    each = max(1, threads // ranks)
    command = [sys.executable, "-m", "minillm.bench.own_gpt", *turn, f"--threads={each}"]
    if ranks > 1:
        mpirun = Path(sys.prefix) / "bin" / "mpirun"
        command = [str(mpirun if mpirun.exists() else "mpirun"), "-n", str(ranks), *command]
    limits = {"OMP_NUM_THREADS": str(each), "OPENBLAS_NUM_THREADS": "1"}
    name = f"minillm {args.dtype}" + (f", {ranks} ranks" if ranks > 1 else "")
    return Contestant(
        name if args.device == "cuda" else f"minillm {ranks} x {each} threads", command, limits
    )


def run(args: TrainBench) -> None:
    """Take turns, then print the table and write the JSON."""
    shape, field = args.shape(), contestants(args)
    print(
        f"{shape}, {shape.step_flops() / 1e9:.1f} GFLOP a step, {args.rounds} rounds of "
        f"{args.seconds:g} s each",
        flush=True,
    )
    take_turns(field, args.rounds)
    rows = [_row(one, field[0], shape) for one in field]
    print(
        "\n"
        + table(
            (
                "",
                "ms a step",
                "tokens/s",
                "GFLOP/s",
                f"of {'SGEMM' if args.dtype == 'float32' else 'GEMM'}",
                "peak MB",
                "minillm is faster by",
                "95 %",
            ),
            rows,
        )
    )
    if args.json:
        Path(args.json).write_text(json.dumps(_report(args, field), indent=1) + "\n")


def _row(one: Contestant, own: Contestant, shape: Shape) -> list[str]:
    times = one.medians()
    if not times:
        return [one.name, *["-"] * 7]
    seconds = float(np.median(times))
    rates = [turn["gemm_flops"] for turn in own.turns if turn is not None]
    share = shape.step_flops() / seconds / np.median(rates) if rates else float("nan")
    cells = [
        one.name,
        f"{seconds * 1e3:.1f}",
        f"{shape.tokens / seconds:.0f}",
        f"{shape.step_flops() / seconds / 1e9:.0f}",
    ]
    cells += [f"{share:.2f}", f"{one.peak_rss() / 1e6:.0f}"]
    return [*cells, *advantage(own, one)]


def _report(args: TrainBench, field: list[Contestant]) -> dict[str, Any]:
    return {
        "shape": args.shape()._asdict(),
        "options": dataclasses.asdict(args),
        "turns": {one.name: one.turns for one in field},
    }
