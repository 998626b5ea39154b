"""Timing on the GPU, and the two ceilings that other numbers are compared with."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# A turn is a thousand times a launch: Python's work between launches stays hidden.
TURN_SECONDS = 5e-3
TURNS = 7


def save_json(path: Path, found: Any) -> None:
    """Replace a file by results as JSON, atomically: it never holds half of them."""
    half = path.with_suffix(".half")
    half.write_text(json.dumps(found), encoding="utf-8")
    os.replace(half, path)


def seconds(run: Callable[[], Any], turns: int = TURNS) -> float:
    """Return the GPU seconds of one `run()`, as the median of `turns` turns.

    A turn repeats the call for about TURN_SECONDS. One turn before the first warms up.
    """
    cuda = importlib.import_module("cupy").cuda
    start, end = cuda.Event(), cuda.Event()
    return median_seconds(run, start, end, lambda e: cuda.get_elapsed_time(start, e), turns)


def median_seconds(
    run: Callable[[], Any], start: Any, end: Any, elapsed: Callable[[Any], float], turns: int
) -> float:
    """Return the median of `seconds`, by the events `start` and `end` of any CUDA library.

    `elapsed` returns the milliseconds from `start` to the event given.
    """

    def turn(calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return elapsed(end) / 1e3 / calls

    run()
    calls = max(1, min(1000, round(TURN_SECONDS / max(turn(2), 1e-6))))
    turn(calls)
    return float(np.median([turn(calls) for _ in range(turns)]))


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
    """Return random normals on the GPU, of the shape and dtype given.

    Zeros would take less power: the GPU would reach rates that no real data reach.
    """
    cupy = importlib.import_module("cupy")
    return cupy.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def bfloat16() -> np.dtype:
    """Return the dtype bfloat16."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16)


def ceilings(size: int = 8192, copy_bytes: int = 1 << 30) -> dict[str, float]:
    """Measure the rates of a matrix product and of a copy on the device.

    Returns `gemm_tflops`, TFLOP/s of a bfloat16 product [size, size] in cuBLAS, and `copy_tbs`,
    TB/s of a copy of `copy_bytes` bytes, counted once for the read and once for the write.
    """
    cupy = importlib.import_module("cupy")
    a, b = (normal((size, size), bfloat16(), seed) for seed in (0, 1))
    gemm = 2.0 * size**3 / seconds(lambda: cupy.matmul(a, b)) / 1e12
    source, target = (cupy.empty(copy_bytes, cupy.uint8) for _ in range(2))
    source.fill(1)
    device_to_device = 3

    def copy() -> None:
        cupy.cuda.runtime.memcpyAsync(
            target.data.ptr,
            source.data.ptr,
            copy_bytes,
            device_to_device,
            cupy.cuda.get_current_stream().ptr,
        )

    return {"gemm_tflops": gemm, "copy_tbs": 2.0 * copy_bytes / seconds(copy) / 1e12}
