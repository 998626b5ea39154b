"""Attention forward and backward over head widths, masks and lengths, beside PyTorch's."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from minillm.kernels.gpu_check.measure import bfloat16, normal, seconds

TOKENS, WIDTH = 16384, 2048  # B T and H K
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_WIDTHS = (64, 128)
TORCH_SECONDS = 90


class Shape(NamedTuple):
    """One row of the table."""

    head_width: int
    causal: bool
    T: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, H, K."""
        return TOKENS // self.T, self.T, WIDTH // self.head_width, self.head_width

    def flops(self, backward: bool) -> float:
        """4 B H T^2 K forward, half of it under the causal mask; backward counts 2.5 times, as published numbers do."""
        B, T, H, K = self.sizes
        return 4.0 * B * H * T * T * K / (2 if self.causal else 1) * (2.5 if backward else 1)


def shapes(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Shape]:
    """All rows."""
    for head_width in HEAD_WIDTHS:
        for causal in (True, False):
            yield from (Shape(head_width, causal, T) for T in lengths)


def run(lengths: tuple[int, ...] = LENGTHS, deadline: float = 2 * TORCH_SECONDS) -> dict[str, Any]:
    """Our variants and PyTorch's back ends: {"rows": [...], "notes": [...]}. A row is a shape's fields with "forward" and "backward", which
    map names to TFLOP/s. Half of the `deadline` in seconds is for ours, what is left then for PyTorch's."""
    notes: list[str] = []
    start = time.perf_counter()
    rows = [{**shape._asdict(), "forward": {}, "backward": {}} for shape in shapes(lengths)]
    for row, shape in zip(rows, shapes(lengths), strict=True):
        if time.perf_counter() - start > deadline / 2:
            notes.append("not run, no time: {head_width} {causal} {T}".format_map(row))
            continue
        for name, forward, backward in _variants(shape):
            _time(row, name, shape, forward, backward, notes)
    theirs, words = _torch(lengths, min(TORCH_SECONDS, deadline - (time.perf_counter() - start)))
    notes += words
    for row, other in zip(rows, theirs, strict=False):
        for way in ("forward", "backward"):
            row[way].update(other[way])
    return {"rows": rows, "notes": list(dict.fromkeys(notes))}


def _variants(shape: Shape) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, forward and backward of every implementation of ours for 16-bit arrays on tensor cores."""
    from minillm import kernels

    B, T, H, K = shape.sizes
    qkv, grad = normal((B, T, 3 * H, K), bfloat16()), normal((B, T, H, K), bfloat16(), 1)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : 2 * H], qkv[:, :, 2 * H :]
    options = dict(scale=K**-0.5, causal=shape.causal)
    o, lse = kernels.attention_forward(q, k, v, **options)
    for entry in kernels.available("attention_forward"):
        if entry.backend != "cuda" or entry.variant in ("auto", "v1") or entry.unavailable:
            continue

        def forward(choice: str = entry.choice) -> Any:
            with kernels.use(attention_forward=choice):
                return kernels.attention_forward(q, k, v, **options)

        def backward(choice: str = entry.choice) -> Any:
            with kernels.use(attention_backward=choice):
                return kernels.attention_backward(grad, q, k, v, o, lse, **options)

        yield entry.variant, forward, backward


def _time(row: dict[str, Any], name: str, shape: Shape, forward: Any, backward: Any, notes: list[str]) -> None:
    """Put the rates of one implementation into its row; what it cannot do becomes a note."""
    for way, call in (("forward", forward), ("backward", backward)):
        try:
            row[way][name] = shape.flops(way == "backward") / seconds(call, turns=5) / 1e12
        except Exception as error:
            notes.append(f"{name} {way}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _torch(lengths: tuple[int, ...], timeout: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of PyTorch, from a process of its own: two CUDA libraries of different releases need not agree in one."""
    if importlib.util.find_spec("torch") is None:
        return [], ["PyTorch is not installed: no yardstick"]
    if timeout <= 0:
        return [], ["not run, no time: PyTorch"]
    command = [sys.executable, "-m", "minillm.kernels.gpu_check.torch_attention", json.dumps(lengths)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [], [f"PyTorch did not end within {timeout:.0f} s"]
    if done.returncode:
        return [], [f"PyTorch failed: {' '.join(done.stderr.split())[-300:]}"]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["rows"], found["notes"]
