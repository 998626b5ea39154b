"""Registration of the CUDA kernels, and the reasons why they cannot run.

A binding is written once and registered twice: as backend `cuda` for CuPy arrays, and as backend
`emulator` for NumPy arrays, where the same `.cu` file runs on the CPU, thread by thread. The
emulator is for tests and for study, and runs only where `use` names it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.kernels.gpu.build import nvrtc_missing
from minillm.kernels.registry import kernel

DTYPES = ("float32", "bfloat16", "float16")


def _no_gpu() -> str | None:
    """Return why no CUDA kernel can run on a GPU, or None.

    Checks for files only: importing CuPy or starting the driver costs every process half a second.
    """
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    # A container or a sandbox may show only some of them: the GPU numbered 3, or the driver alone.
    signs = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/proc/driver/nvidia/version")
    if not (any(Path(name).exists() for name in signs) or any(Path("/dev").glob("nvidia[0-9]*"))):
        return "no GPU: this machine has no NVIDIA device"
    return nvrtc_missing()


unavailable: str | None = _no_gpu()
"""Reason why no CUDA kernel can run on a GPU, or None."""

emulator_unavailable: str | None = (
    None
    if os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    else "the emulator needs a C++ compiler: install g++ or clang++"
)
"""Reason why no CUDA kernel can run in the emulator, or None."""


def cuda_kernel(
    op: str, variant: str = "v1", *, dtypes: tuple[str, ...] = DTYPES, missing: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a binding as the implementation `variant` of `op` on the GPU and in the emulator.

    `missing`: reason why it cannot run on a GPU that is present.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        kernel(
            op, backend="cuda", variant=variant, dtypes=dtypes, unavailable=unavailable or missing
        )(fn)
        emulated = functools.partial(
            fn
        )  # a function of its own, so that the registry tells the two apart
        emulated.__module__ = fn.__module__
        kernel(
            op, backend="emulator", variant=variant, dtypes=dtypes, unavailable=emulator_unavailable
        )(emulated)
        return fn

    return register
