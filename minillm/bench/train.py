"""`python -m minillm.bench train`: the training step beside PyTorch's, in processes that take turns."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillm.bench.shapes import CONFIGS, Shape
from minillm.bench.timing import FOREIGN_LIMIT, ForeignLoad, interval, table
from minillm.comm.world import usable_cores
from minillm.errors import ConfigError, MinillmError

# What a PyTorch user who knows the allocator sets: freed memory stays with the process.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31), "MALLOC_TOP_PAD_": str(1 << 26)}


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """Time the training step of a GPT-2, on its own or beside PyTorch."""

    config: Literal["c1", "c2", "c3", "g2"] = "c2"
    """Sizes: c1 4x128 context 64, c2 6x384 context 256, c3 4x512 with 50304 tokens, g2 GPT-2 124M."""
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
    """What to compare with: torch runs eager and compiled, as it comes and well set (fused AdamW, allocator)."""
    compile: bool = True
    """Run torch.compile too (its first step takes a minute)."""
    threads: int = 0
    """Threads in all; 0: one for each core."""
    ranks: int = 1
    """Data-parallel ranks that share the threads."""
    rounds: int = 5
    """Turns of each contestant."""
    seconds: float = 3.0
    """Length of a turn, without starting and warming up."""
    json: str | None = None
    """File to write the results to."""

    def __post_init__(self) -> None:
        for name in ("ranks", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1")

    def shape(self) -> Shape:
        """The configuration with what was given instead."""
        given = {name: getattr(self, name) for name in Shape._fields if getattr(self, name) is not None}
        return CONFIGS[self.config]._replace(**given)


@dataclass
class Contestant:
    """A command that prints one turn's times as JSON, with its turns so far."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    turns: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)

    def take_turn(self) -> None:
        """Run once; a turn with foreign load is kept as None."""
        with ForeignLoad() as load:
            done = subprocess.run(self.command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        if done.returncode:
            raise MinillmError(f"{self.name} ended with status {done.returncode}: {done.stderr.strip()[-800:]}")
        self.turns.append(None if load.share > FOREIGN_LIMIT else json.loads(done.stdout.strip().splitlines()[-1]))

    def seconds(self, turn: int) -> float | None:
        """Median step time of a turn; None if it does not count."""
        found = self.turns[turn]
        return None if found is None else float(np.median(found["times"]))

    def medians(self) -> list[float]:
        """Step times of the turns that count."""
        return [s for s in (self.seconds(i) for i in range(len(self.turns))) if s is not None]

    def peak_rss(self) -> float:
        """Largest peak memory of a turn, in bytes."""
        return max((turn["peak_rss"] for turn in self.turns if turn is not None), default=float("nan"))


def contestants(args: TrainBench) -> list[Contestant]:
    """Ours first, then PyTorch's four."""
    shape, threads = args.shape(), args.threads or usable_cores()
    each = max(1, threads // args.ranks)
    sizes = [f"--{name}={value}" for name, value in shape._asdict().items()]
    turn = [*sizes, f"--seconds={args.seconds}", "--warmup=3"]
    own = [sys.executable, "-m", "minillm.bench.own_gpt", *turn, f"--threads={each}"]
    if args.ranks > 1:
        mpirun = Path(sys.prefix) / "bin" / "mpirun"
        own = [str(mpirun if mpirun.exists() else "mpirun"), "-n", str(args.ranks), *own]
    limits = {"OMP_NUM_THREADS": str(each), "OPENBLAS_NUM_THREADS": "1"}
    found = [Contestant(f"minillm {args.ranks} x {each} threads", own, limits)]
    if args.against == "torch":
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("--against torch needs PyTorch: pip install torch --index-url https://download.pytorch.org/whl/cpu")
        yardstick = [sys.executable, "-m", "minillm.bench.torch_gpt", *turn, f"--threads={threads}"]
        limits = {"OMP_NUM_THREADS": str(threads)}
        for compiled in ([], ["--compile"])[: 2 if args.compile else 1]:
            kind = "compile" if compiled else "eager"
            found.append(Contestant(f"torch {kind}", yardstick + compiled, limits))
            found.append(Contestant(f"torch {kind}, tuned", [*yardstick, *compiled, "--fused"], limits | TUNED))
    return found


def run(args: TrainBench) -> None:
    """Take turns, then print the table and write the JSON."""
    shape, field = args.shape(), contestants(args)
    print(f"{shape}, {shape.step_flops() / 1e9:.1f} GFLOP a step, {args.rounds} rounds of {args.seconds:g} s each", flush=True)
    for i in range(args.rounds):
        for one in field:
            one.take_turn()
            seconds = one.seconds(i)
            note = "left out: others used the machine" if seconds is None else f"{seconds * 1e3:9.1f} ms"
            print(f"round {i + 1}  {one.name:24s} {note}", flush=True)
    rows = [_row(one, field[0], shape) for one in field]
    print("\n" + table(("", "ms a step", "tokens/s", "GFLOP/s", "of SGEMM", "peak MB", "minillm is faster by", "95 %"), rows))
    if args.json:
        Path(args.json).write_text(json.dumps(_report(args, field), indent=1) + "\n")


def _row(one: Contestant, own: Contestant, shape: Shape) -> list[str]:
    times = one.medians()
    if not times:
        return [one.name, *["-"] * 7]
    seconds = float(np.median(times))
    rates = [turn["sgemm_flops"] for turn in own.turns if turn is not None]
    share = shape.step_flops() / seconds / np.median(rates) if rates else float("nan")
    cells = [one.name, f"{seconds * 1e3:.1f}", f"{shape.tokens / seconds:.0f}", f"{shape.step_flops() / seconds / 1e9:.0f}"]
    cells += [f"{share:.2f}", f"{one.peak_rss() / 1e6:.0f}"]
    pairs = [(one.seconds(i), own.seconds(i)) for i in range(len(one.turns))]
    ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
    if one is own or not ratios:
        return [*cells, "", ""]
    low, high = interval(ratios)
    return [*cells, f"{np.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"]


def _report(args: TrainBench, field: list[Contestant]) -> dict[str, Any]:
    return {"shape": args.shape()._asdict(), "options": dataclasses.asdict(args), "turns": {one.name: one.turns for one in field}}
