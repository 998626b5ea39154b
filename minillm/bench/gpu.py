"""Training section of `kernels/gpu_check.sh`: `python -m minillm.bench.gpu --json FILE`.

Compares training with the CPU's and shared ranks with one (agreement.py), then times GPT-2 124M,
the parts of its step, and PyTorch beside it. Takes at most nine minutes. A section that breaks does
not stop the others; the page names the sections that did not run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.device import Device, open_device
from minillm.bench.agreement import STEPS, losses, ranks, started_by
from minillm.bench.contest import Contestant, command
from minillm.bench.shapes import Shape
from minillm.bench.synthetic import random_trainer
from minillm.comm.single import SelfCommunicator
from minillm.kernels.gpu_check.report import table

GPT2 = Shape(12, 12, 768, 1024, 32, 50304)
SECONDS = 525  # of gpu_check's 540 for training; the rest starts and ends the process
RUN_SECONDS, COMPILE_SECONDS, RANKS_SECONDS = 60, 240, 75
# Rows of a product that keeps the GPU busy. About 20 ms each: a driver's queue holds some thousand
# launches, and a step needs most of them.
BUSY = 8192
COMPARED = {
    "losses": f"Losses of {STEPS} steps against the CPU in float32",
    "ranks": "Ranks that share the GPU ({}), against one",
}
TIMED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("minillm_run", {"recompute": "none"}),
    "selective": ("minillm_run", {"recompute": "selective"}),
    "cublaslt": ("minillm_run", {"choices": "matmul=cuda:cublaslt"}),
    "torch eager": ("torch_run", {"fused": True, "compiled": False}),
    "torch compile": ("torch_run", {"fused": True, "compiled": True}),
}
"""Section -> program and its options."""
# The two that the first goal compares come early.
SECTIONS = (
    *("losses", "ranks", "gpt2", "torch compile"),
    *("profile", "selective", "cublaslt", "torch eager"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return 1 if a section found or had a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m minillm.bench.gpu",
        description="Check and time training on this machine's GPU.",
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}"
    )
    args = parser.parse_args(argv)

    def save(found: dict[str, Any]) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(found | {"page": markdown(found)}, indent=1) + "\n")

    found = run([name.strip() for name in args.only.split(",")], GPT2, save)
    print(markdown(found))
    return int(bool(found["problems"]))


def run(
    wanted: Sequence[str], shape: Shape, save: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """Run the sections `wanted`; return the findings, and `problems` in words.

    `save` receives the findings before each section and at the end, in case this process is
    stopped. Sections of PyTorch do not run where it is not installed.
    """
    found: dict[str, Any] = {
        "problems": [],
        "shape": shape._asdict(),
        "not_run": [name for name in SECTIONS if name in wanted],
    }
    end = time.perf_counter() + SECONDS

    def section(name: str, left: float) -> Any:
        if name in TIMED:
            return _timed(name, shape, left)
        if name == "profile":
            return profile(open_device("cuda"), shape)
        return losses() if name == "losses" else ranks(min(RANKS_SECONDS, left))

    with kernels.threads(4):
        for name in tuple(found["not_run"]):
            save(found)
            started = time.perf_counter()
            if "torch" in name and importlib.util.find_spec("torch") is None:
                continue
            if started >= end:
                found["problems"].append(f"{name}: not run, no time")
                continue
            try:
                found[name] = section(name, end - started)
            except Exception as error:
                words = " ".join(str(error).split())[:400]
                found["problems"].append(f"{name}: {type(error).__name__}: {words}")
            found["not_run"].remove(name)
            found["problems"] += [
                f"{name}: {row['name']} is off by {row['error']:.1e}"
                for row in (found.get(name, ()) if name in COMPARED else ())
                if not row["good"]
            ]
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    save(found)
    return found


def _timed(name: str, shape: Shape, left: float) -> dict[str, Any]:
    """Time GPT-2 in a process of its own that takes at most `left` seconds."""
    program, options = TIMED[name]
    options = shape._asdict() | dict(threads=8, seconds=4, warmup=5, **options)
    options |= dict(device="cuda", dtype="bfloat16")
    most = COMPILE_SECONDS if options.get("compiled") else RUN_SECONDS
    found = Contestant(name, command(program, "train", options)).run(min(most, left))
    seconds = float(np.median(found["step"]))
    rates = {"tokens_per_second": shape.tokens / seconds, "flops": shape.step_flops() / seconds}
    return found | {"seconds": seconds, **rates}


def profile(device: Device, shape: Shape) -> dict[str, Any]:
    """Return the shares of a step's time.

    These are products, attention, other kernels, CuPy's own kernels, and gaps in which the GPU
    waits for the host. The GPU's own time is that of a step queued behind work that keeps it busy
    until the host has queued all of it.
    """
    options: dict[str, Any] = dict(device="cuda", dtype="bfloat16", recompute="none")
    trainer = random_trainer(SelfCommunicator(), device, shape, **options)
    for step in range(4):
        trainer.step(step)
    free = _span(device, lambda _: [trainer.step(step) for step in range(4, 9)]) / 5
    trainer.step(9).verdict.numbers()
    idle: list[bool] = []

    def watched(start: Any) -> None:
        trainer.step(10)
        idle.append(start.done)  # the GPU had nothing left before all of the step was queued

    busy = _span(device, watched, lambda: _keep_busy(device, 2 * free + 0.05))
    parts: dict[str, list[Any]] = {}
    with _bracketed(device, parts):
        trainer.step(11).verdict.numbers()
    spent = {
        name: sum(device.xp.cuda.get_elapsed_time(*pair) for pair in pairs) / 1e3
        for name, pairs in parts.items()
    }
    spent["CuPy's kernels"] = max(0.0, busy - sum(spent.values()))
    spent["host gaps"] = max(0.0, free - busy)
    shares = {name: s / free for name, s in spent.items()}
    launches = sum(map(len, parts.values()))
    found = dict(step_seconds=free, busy_seconds=busy, launches=launches, shares=shares)
    return found | {"idle": any(idle)}


def _span(
    device: Device, work: Callable[[Any], Any], behind: Callable[[], Any] = lambda: None
) -> float:
    """Return the GPU seconds of `work(start)`, queued after the work of `behind`.

    `start` is the event between the two.
    """
    cuda = device.xp.cuda
    start, end = cuda.Event(), cuda.Event()
    device.synchronize()
    behind()
    start.record()
    work(start)
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) / 1e3


def _keep_busy(device: Device, seconds: float) -> None:
    """Queue products that take about `seconds`."""
    a = device.xp.ones((BUSY, BUSY), np.float32)
    kernels.matmul(a, a)  # loads the library's kernel
    once = _span(device, lambda _: kernels.matmul(a, a))
    for _ in range(min(200, math.ceil(seconds / max(once, 1e-4)))):
        kernels.matmul(a, a)


@contextmanager
def _bracketed(device: Device, parts: dict[str, list[Any]]) -> Iterator[None]:
    """Record events around every product and every own kernel, as pairs in `parts`."""
    launch: Any = importlib.import_module("minillm.kernels.gpu.launching")
    matmul: Any = importlib.import_module("minillm.kernels.matmul.cuda")
    cuda, own_function, own_gemm = device.xp.cuda, launch._function, matmul.gemm

    def timed(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start, end = cuda.Event(), cuda.Event()
            start.record()
            result = call(*args, **kwargs)
            end.record()
            parts.setdefault(kind, []).append((start, end))
            return result

        return run

    @cache
    def kernel(kind: str, own: Any) -> Any:
        run: Any = timed(kind, own)
        run.ptr = own.ptr  # identifies the kernel when its occupancy is queried
        return run

    def function(path: Path, name: str, *rest: Any) -> Any:
        kind = "attention" if path.parent.name == "attention" else "other kernels"
        return kernel(kind, own_function(path, name, *rest))

    launch._function, matmul.gemm = function, timed("products", own_gemm)
    try:
        yield
    finally:
        launch._function, matmul.gemm = own_function, own_gemm


def markdown(found: dict[str, Any]) -> str:
    """Return the findings as a page."""
    parts = ["## Training"]

    def add(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            parts.extend([f"### {title}", table(header, rows)])

    for name, title in COMPARED.items():
        rows = [
            [r["name"], f"{r['error']:.1e}", f"{r['limit']:.0e}", "yes" if r["good"] else "NO"]
            for r in found.get(name, ())
        ]
        title = title.format(started_by()[1])
        add(title, ("run", "largest error", "allowed", "good"), rows)
    names = {
        "gpt2": "minillm",
        "selective": "minillm, selective recomputation",
        "cublaslt": "minillm, products by cuBLASLt",
    }
    ceiling = found.get("gpt2", {}).get("gemm_flops", math.nan)
    rows = [
        [
            names.get(name, name),
            f"{one['tokens_per_second']:.0f}",
            f"{one['seconds'] * 1e3:.1f}",
            f"{one['flops'] / ceiling:.2f}",
            f"{one['peak_rss'] / 1e9:.2f}",
        ]
        for name in TIMED
        if (one := found.get(name))
    ]
    header = ("", "tokens/s", "ms a step", "of GEMM", "peak GB")
    add(f"GPT-2 {found['shape']}, bfloat16", header, rows)
    if "profile" in found:
        rows = [[name, f"{share:.1%}"] for name, share in found["profile"]["shares"].items()]
        title = f"Where a step's time goes ({found['profile']['launches']} launches of own kernels)"
        add(title, ("part", "share"), rows)
        if found["profile"].get("idle"):
            words = "The GPU ran out of work while the step was queued: host gaps are too low."
            parts.append(words)
    add("Goals", ("goal", "wanted", "found"), goals(found))
    parts += [f"Not run: {', '.join(found['not_run'])}."] if found["not_run"] else []
    return "\n\n".join([*parts, *(f"PROBLEM {words}" for words in found["problems"])])


def goals(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return each goal, the value wanted and the value found."""

    def ratio(name: str, of: str, other: str, over: str) -> str:
        if not (found.get(name) and found.get(other)):
            return "not measured"
        return f"{found[name][of] / found[other][over]:.2f}"

    speed, memory = "tokens_per_second", "peak_rss"
    gaps = found.get("profile", {}).get("shares", {}).get("host gaps")
    return [
        ("tokens/s over torch.compile", "1.15", ratio("gpt2", speed, "torch compile", speed)),
        (
            "share of the measured GEMM ceiling",
            "0.45",
            ratio("gpt2", "flops", "gpt2", "gemm_flops"),
        ),
        (
            "peak memory over torch.compile",
            "at most 0.60",
            ratio("gpt2", memory, "torch compile", memory),
        ),
        ("host gaps", "at most 0.01", "not measured" if gaps is None else f"{gaps:.2f}"),
        (
            "tokens/s with products by cuBLASLt over those by cuBLAS",
            "above 1.00 to become the default",
            ratio("cublaslt", speed, "gpt2", speed),
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
