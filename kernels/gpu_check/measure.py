"""Time on the GPU, and the two ceilings that other numbers are held against."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

# of one timed turn: long beside a launch, so that what Python does between launches is hidden
TURN_SECONDS = 5e-3
TURNS = 7


def seconds(run: Callable[[], Any], turns: int = TURNS) -> float:
    """GPU seconds of one `run()`: the median of several turns, each of as many calls as fill it,
    after one turn to warm up."""
    cuda = importlib.import_module("cupy").cuda
    start, end = cuda.Event(), cuda.Event()

    def turn(calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return cuda.get_elapsed_time(start, end) / 1e3 / calls

    run()
    calls = max(1, min(1000, round(TURN_SECONDS / max(turn(2), 1e-6))))
    turn(calls)
    return float(np.median([turn(calls) for _ in range(turns)]))


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
    """Random normals on the GPU: zeros would flatter it, by way of its power limit."""
    cupy = importlib.import_module("cupy")
    return cupy.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def bfloat16() -> np.dtype:
    """The dtype."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16)


def ceilings(size: int = 8192, copy_bytes: int = 1 << 30) -> dict[str, float]:
    """TFLOP/s of a large bfloat16 product in cuBLAS, and TB/s, read and written, of a copy on the
    device."""
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
