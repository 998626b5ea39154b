"""`python -m minillm.bench attention`, `head` and `generate`: parts of a model beside PyTorch's, in
processes that take turns."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.bench.timing import table
from minillm.bench.turns import Contestant, advantage, require_torch, take_turns
from minillm.comm.cores import usable_cores


@dataclass(frozen=True, kw_only=True)
class PartBench(Record):
    """What the benchmarks of parts have in common."""

    against: Literal["none", "torch"] = "none"
    """What to compare with."""
    threads: int = 0
    """Threads; 0: one for each core."""
    rounds: int = option(5, at_least=1)
    """Turns of each contestant."""
    seconds: float = 1.0
    """Length of a measurement."""
    json: str | None = None
    """File to write the results to."""


@dataclass(frozen=True)
class Part:
    """One size of a part: the options of its turn, and for each time that the turn reports how much
    is done in it."""

    label: str
    options: dict[str, Any]
    amounts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AttentionBench(PartBench):
    """Time attention forward and backward, beside scaled_dot_product_attention."""

    tokens: int = 4096
    """Tokens in all: batch times context."""
    contexts: str = "64,256,1024,4096"
    """Lengths of the sequences."""
    heads: int = 6
    """Number of heads."""
    width: int = 64
    """Width of a head."""
    causal: bool = True
    """Hide the future."""

    def parts(self) -> list[Part]:
        """One for each context: FLOPs of the visible half, 4 and 10 B H T T K."""
        parts = []
        for context in _numbers("contexts", self.contexts):
            batch = max(1, self.tokens // context)
            flops = batch * self.heads * context**2 * self.width * (0.5 if self.causal else 1.0)
            options = dict(
                batch=batch,
                context=context,
                heads=self.heads,
                width=self.width,
                causal=int(self.causal),
            )
            parts.append(
                Part(f"T = {context}", options, {"forward": 4 * flops, "backward": 10 * flops})
            )
        return parts


@dataclass(frozen=True, kw_only=True)
class HeadBench(PartBench):
    """Time the language-model head with its loss and both gradients, and the memory it needs."""

    rows: int = 2048
    """Tokens in a microbatch."""
    dim: int = 768
    """Width of the model."""
    vocabs: str = "256,8192,50304"
    """Sizes of the vocabulary."""

    def parts(self) -> list[Part]:
        """One for each vocabulary: three products."""
        return [
            Part(
                f"V = {vocab}",
                dict(rows=self.rows, dim=self.dim, vocab=vocab),
                {"loss and gradients": 6.0 * self.rows * self.dim * vocab},
            )
            for vocab in _numbers("vocabs", self.vocabs)
        ]


@dataclass(frozen=True, kw_only=True)
class GenerateBench(PartBench):
    """Time writing text with a key-value cache, by default with GPT-2 124M."""

    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of heads."""
    dim: int = 768
    """Width of the model."""
    context: int = 1024
    """Capacity of the cache."""
    vocab: int = 50257
    """Number of tokens."""
    prompt: int = 32
    """Tokens of the prompt."""
    batches: str = "1,8"
    """Texts written at once."""

    def parts(self) -> list[Part]:
        """One for each batch: tokens read, tokens written."""
        sizes = {
            name: getattr(self, name)
            for name in ("layers", "heads", "dim", "context", "vocab", "prompt")
        }
        return [
            Part(
                f"batch {batch}",
                sizes | dict(batch=batch),
                {"prompt": float(batch * self.prompt), "token": float(batch)},
            )
            for batch in _numbers("batches", self.batches)
        ]


UNITS = {
    AttentionBench: ("GFLOP/s", 1e-9),
    HeadBench: ("GFLOP/s", 1e-9),
    GenerateBench: ("tokens/s", 1.0),
}


def _numbers(name: str, text: str) -> list[int]:
    """The numbers of a list such as "64,256". Raises ConfigError."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--{name} {text} must be numbers from 1 up, as in 64,256")
    return numbers


def contestants(kind: str, part: Part, args: PartBench) -> list[Contestant]:
    """Ours, and PyTorch's if asked for."""
    threads = args.threads or usable_cores()
    turn = [
        kind,
        *(f"--{name}={value}" for name, value in part.options.items()),
        f"--threads={threads}",
        f"--seconds={args.seconds}",
    ]
    own = [sys.executable, "-m", "minillm.bench.own_parts", *turn]
    field = [
        Contestant("minillm", own, {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"})
    ]
    if args.against == "torch":
        require_torch()
        field.append(
            Contestant(
                "torch",
                [sys.executable, "-m", "minillm.bench.torch_parts", *turn],
                {"OMP_NUM_THREADS": str(threads)},
            )
        )
    return field


def run(args: Any) -> None:
    """Every size in turn, then the table and the JSON."""
    kind = type(args).__name__.removesuffix("Bench").lower()
    unit, scale = UNITS[type(args)]
    rows: list[Sequence[str]] = []
    results = []
    print(f"{args.threads or usable_cores()} threads, {args.rounds} rounds, float32", flush=True)
    for part in args.parts():
        field = contestants(kind, part, args)
        take_turns(field, args.rounds, list(part.amounts)[-1], f"{part.label}  ")
        for what, amount in part.amounts.items():
            for one in field:
                times = one.medians(what)
                if not times:
                    continue
                seconds = float(np.median(times))
                cells = [
                    f"{part.label} {what}",
                    one.name,
                    f"{seconds * 1e3:.2f}",
                    f"{amount / seconds * scale:.0f}",
                ]
                rows.append(
                    [*cells, f"{one.peak_rss() / 1e6:.0f}", *advantage(field[0], one, what)]
                )
        results.append({"options": part.options, "turns": {one.name: one.turns for one in field}})
    print("\n" + table(("", "", "ms", unit, "peak MB", "minillm is faster by", "95 %"), rows))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"options": dataclasses.asdict(args), "results": results}, indent=1) + "\n"
        )


def turn_options() -> tuple[str, dict[str, int], float]:
    """The command line of a turn: its kind, its sizes, and the seconds to measure for."""
    kind, *options = sys.argv[1:]
    values = dict(option.removeprefix("--").split("=", 1) for option in options)
    seconds = float(values.pop("seconds"))
    return kind, {name: int(value) for name, value in values.items()}, seconds
