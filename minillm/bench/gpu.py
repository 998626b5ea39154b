"""The training part of `kernels/gpu_check.sh`: `python -m minillm.bench.gpu --json FILE`, on a GPU,
in at most four minutes.

What training computes (agreement.py: losses against the CPU, ranks that share the GPU against one);
GPT-2 124M and where the time of its step goes; the same beside PyTorch's. Every part is tried,
whatever happens to the others, while there is time; the page names those that did not run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import subprocess
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
from minillm.bench.shapes import Shape
from minillm.bench.timing import table
from minillm.comm.single import SelfCommunicator
from minillm.data.batches import Batches
from minillm.tasks.language_model import LanguageModeling
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer

GPT2 = Shape(12, 12, 768, 1024, 32, 50304)
SECONDS = 225
TURN_SECONDS, COMPILE_SECONDS, RANKS_SECONDS = 60, 150, 75
BUSY = 4096  # rows of a product that keeps the GPU busy
TORCH = ("torch eager", "torch compile")
SECTIONS = ("losses", "ranks", "gpt2", "profile", "cublaslt", *TORCH)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 1 if something is wrong or broke."""
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
    """All sections asked for; `problems` in words. `save` gets what there is before each and at the
    end, in case there is no time for the rest. Sections of PyTorch do not run where it is not
    installed."""
    found: dict[str, Any] = {
        "problems": [],
        "shape": shape._asdict(),
        "not_run": [name for name in SECTIONS if name in wanted],
    }
    end = time.perf_counter() + SECONDS

    def turn(program: str, *more: str, most: float = TURN_SECONDS) -> dict[str, Any]:
        return _turn(program, shape, min(most, end - time.perf_counter()), *more)

    sections: dict[str, Callable[[], Any]] = {
        "losses": losses,
        "ranks": lambda: ranks(min(RANKS_SECONDS, end - time.perf_counter())),
        "gpt2": lambda: turn("own_gpt"),
        "profile": lambda: profile(open_device("cuda"), shape),
        "cublaslt": lambda: turn("own_gpt", "--kernels=matmul=cuda:cublaslt"),
        "torch eager": lambda: turn("torch_gpt", "--fused"),
        "torch compile": lambda: turn("torch_gpt", "--fused", "--compile", most=COMPILE_SECONDS),
    }
    with kernels.threads(4):
        for name in tuple(found["not_run"]):
            save(found)
            started = time.perf_counter()
            if name in TORCH and importlib.util.find_spec("torch") is None:
                continue
            if started >= end:
                found["problems"].append(f"{name}: not run, no time")
                continue
            try:
                found[name] = sections[name]()
            except Exception as error:
                found["problems"].append(
                    f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
                )
            found["not_run"].remove(name)
            if name in ("losses", "ranks"):
                found["problems"] += [
                    f"{name}: {row['name']} is off by {row['error']:.1e}"
                    for row in found.get(name, ())
                    if not row["good"]
                ]
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    save(found)
    return found


# ---- how fast


def _turn(program: str, shape: Shape, timeout: float, *more: str) -> dict[str, Any]:
    """A turn of GPT-2 in a process of its own."""
    sizes = [f"--{name}={value}" for name, value in shape._asdict().items()]
    rest = ["--threads=8", "--seconds=4", "--warmup=5", "--device=cuda", "--dtype=bfloat16"]
    command = [sys.executable, "-m", f"minillm.bench.{program}", *sizes, *rest, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(
            f"{program} ended with status {done.returncode}: {done.stderr.strip()[-400:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = float(np.median(found["times"]))
    return found | {
        "seconds": seconds,
        "tokens_per_second": shape.tokens / seconds,
        "flops": shape.step_flops() / seconds,
    }


def profile(device: Device, shape: Shape) -> dict[str, Any]:
    """Shares of a step's time: products, attention, our other kernels, CuPy's, and gaps in which
    the GPU waits for the host.

    The GPU's own time is that of a step queued behind work that keeps it busy until the host has
    queued all of it.
    """
    assert not device.on_host
    sizes = {name: getattr(shape, name) for name in ("layers", "heads", "dim", "context", "batch")}
    asked = RunConfig().replace(**sizes, device="cuda", dtype="bfloat16")
    config = resolve(asked, 1, shape.vocab)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, 100_000)
    task = LanguageModeling(Batches(tokens, shape.context, shape.batch, seed=1))
    trainer = Trainer(config, SelfCommunicator(), task, device=device)
    for step in range(4):
        trainer.step(step)
    free = _span(device, lambda: [trainer.step(step) for step in range(4, 9)]) / 5
    trainer.step(9).verdict.numbers()
    busy = _span(
        device, lambda: trainer.step(10), behind=lambda: _keep_busy(device, 2 * free + 0.05)
    )
    parts: dict[str, list[Any]] = {}
    with _bracketed(device, parts):
        trainer.step(11).verdict.numbers()
    spent = {
        name: sum(device.xp.cuda.get_elapsed_time(*pair) for pair in pairs) / 1e3
        for name, pairs in parts.items()
    }
    spent["CuPy's kernels"] = max(0.0, busy - sum(spent.values()))
    spent["host gaps"] = max(0.0, free - busy)
    launches = sum(map(len, parts.values()))
    return {
        "step_seconds": free,
        "busy_seconds": busy,
        "launches": launches,
        "shares": {name: s / free for name, s in spent.items()},
    }


def _span(
    device: Device, work: Callable[[], Any], behind: Callable[[], Any] = lambda: None
) -> float:
    """GPU seconds from the start of `work` to its end, after what `behind` has queued."""
    cuda = device.xp.cuda
    start, end = cuda.Event(), cuda.Event()
    device.synchronize()
    behind()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) / 1e3


def _keep_busy(device: Device, seconds: float) -> None:
    """Queue products that take about so long."""
    a = device.xp.ones((BUSY, BUSY), np.float32)
    kernels.matmul(a, a)  # the first one loads the library's kernel
    once = _span(device, lambda: kernels.matmul(a, a))
    for _ in range(min(200, math.ceil(seconds / max(once, 1e-4)))):
        kernels.matmul(a, a)


@contextmanager
def _bracketed(device: Device, parts: dict[str, list[Any]]) -> Iterator[None]:
    """Put events around every product and every kernel of ours."""
    launch: Any = importlib.import_module("minillm.kernels.launch")
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
        run.ptr = own.ptr  # by which its occupancy is asked for
        return run

    def function(path: Path, name: str, *rest: Any) -> Any:
        return kernel(
            "attention" if path.parent.name == "attention" else "other kernels",
            own_function(path, name, *rest),
        )

    launch._function, matmul.gemm = function, timed("products", own_gemm)
    try:
        yield
    finally:
        launch._function, matmul.gemm = own_function, own_gemm


# ---- the page


def markdown(found: dict[str, Any]) -> str:
    """The findings as a page."""
    parts = ["## Training"]
    for name, title in (
        ("losses", f"Losses of {STEPS} steps against the CPU in float32"),
        ("ranks", f"Ranks that share the GPU ({started_by()[1]}), against one"),
    ):
        rows = [
            [r["name"], f"{r['error']:.1e}", f"{r['limit']:.0e}", "yes" if r["good"] else "NO"]
            for r in found.get(name, ())
        ]
        parts += (
            [f"### {title}", table(("run", "largest error", "allowed", "good"), rows)]
            if rows
            else []
        )
    turns = {"minillm": found.get("gpt2"), "minillm, products by cuBLASLt": found.get("cublaslt")}
    turns |= {name: found.get(name) for name in TORCH}
    ceiling = (found.get("gpt2") or {}).get("gemm_flops", math.nan)
    rows = [
        [
            name,
            f"{t['tokens_per_second']:.0f}",
            f"{t['seconds'] * 1e3:.1f}",
            f"{t['flops'] / ceiling:.2f}",
            f"{t['peak_rss'] / 1e9:.2f}",
        ]
        for name, t in turns.items()
        if t
    ]
    if rows:
        parts += [
            f"### GPT-2 {found['shape']}, bfloat16",
            table(("", "tokens/s", "ms a step", "of GEMM", "peak GB"), rows),
        ]
    if found.get("profile"):
        rows = [[name, f"{share:.1%}"] for name, share in found["profile"]["shares"].items()]
        parts += [
            f"### Where a step's time goes ({found['profile']['launches']} launches of ours)",
            table(("part", "share"), rows),
        ]
    rows = [[name, want, got] for name, want, got in goals(found)]
    parts += ["### Goals", table(("goal", "wanted", "found"), rows)]
    parts += [f"Not run: {', '.join(found['not_run'])}."] if found["not_run"] else []
    return "\n\n".join([*parts, *(f"PROBLEM {words}" for words in found["problems"])])


def goals(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each goal, what it asks for, and what was found."""
    own, compiled = found.get("gpt2"), found.get("torch compile")
    speed = own["tokens_per_second"] / compiled["tokens_per_second"] if own and compiled else None
    fused = found.get("cublaslt")
    gain = fused["tokens_per_second"] / own["tokens_per_second"] if own and fused else None
    memory = own["peak_rss"] / compiled["peak_rss"] if own and compiled else None
    gaps = found["profile"]["shares"]["host gaps"] if found.get("profile") else None
    share = own["flops"] / own["gemm_flops"] if own else None
    rows = (
        *(
            ("tokens/s over torch.compile", "1.15", speed),
            ("share of the measured GEMM ceiling", "0.45", share),
        ),
        *(
            ("peak memory over torch.compile", "at most 0.60", memory),
            ("host gaps", "at most 0.01", gaps),
        ),
        (
            "tokens/s with products by cuBLASLt over those by cuBLAS",
            "above 1.00 to become the default",
            gain,
        ),
    )
    return [
        (name, wanted, "not measured" if value is None else f"{value:.2f}")
        for name, wanted, value in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
