"""All kernel tests on the device: every case of tests/kernels, poisoned outputs, the same bits every time."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.registry import KernelUnavailable

REPEATS = 10
SECONDS = 110.0
DTYPES = ("float32", "bfloat16", "float16")
SANITIZER_ELEMENTS = 20_000  # of a case's inputs: the sanitizer slows a kernel down a hundredfold
SANITIZER_SECONDS = 45
SANITIZER_START = 30  # seconds until the first case


def run(
    tests: Path,
    repeats: int = REPEATS,
    most_elements: int | None = None,
    deadline: float = SECONDS,
    device: Any = None,
    source: str = "cuda",
) -> dict[str, Any]:
    """Run the cases in the folder `tests` on `device`, by default the GPU, with the kernels of backend `source`, for at most `deadline`
    seconds. Returns how many ran, the failures with their words, and how many there was no time for."""
    device_arrays, kernel_check = _import(tests)
    device = device or device_arrays.CupyDevice()
    device_arrays.register(device, source)
    start = time.perf_counter()
    failures, left_out, ran, left = [], set(), 0, 0
    with contextlib.ExitStack() as poisoned:
        for module in {id(m): m for m in (np, device.module)}.values():
            poisoned.enter_context(kernel_check.poisoned_memory(module))
        for case, choice, dtype in crossing(tests, most_elements):
            if time.perf_counter() - start > deadline:
                left += 1
                continue
            ran += 1
            try:
                kernel_check.check_case(case, choice, dtype, repeats=repeats)
            except KernelUnavailable as reason:  # a kernel for another device
                ran -= 1
                left_out.add(f"{choice}: {' '.join(str(reason).split())[:200]}")
            except Exception as error:
                failures.append({"case": f"{case}-{choice}-{dtype}", "words": _words(error)})
    elapsed = time.perf_counter() - start
    return {"ran": ran, "failures": failures, "left_out": sorted(left_out), "no_time": left, "repeats": repeats, "seconds": elapsed}


def crossing(tests: Path, most_elements: int | None = None, backend: str = "device") -> Iterator[tuple[Any, str, str]]:
    """Case, choice and dtype of everything there is to run; small cases only where `most_elements` says so."""
    _, kernel_check = _import(tests)
    for case in importlib.import_module("kernel_cases").all_cases():
        if most_elements is not None and sum(x.size for x in case.inputs(np.random.default_rng(0))) > most_elements:
            continue
        for dtype in DTYPES:
            for choice in kernel_check.implementations(case, dtype, (backend,)):
                yield case, choice, dtype


def _import(tests: Path) -> tuple[Any, Any]:
    if str(tests) not in sys.path:
        sys.path.insert(0, str(tests))
    return importlib.import_module("device_arrays"), importlib.import_module("kernel_check")


def _words(error: Exception) -> str:
    """The error and where it came from, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "kernels" in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def random_bits_agree() -> str | None:
    """Whether addressed normals have NumPy's bits; what is wrong if not."""
    from minillm import kernels

    cupy = importlib.import_module("cupy")
    indices = np.r_[np.arange(50_000), np.random.default_rng(0).integers(0, 2**63, 50_000)].astype(np.uint64)
    found = cupy.asnumpy(kernels.random_normal(2**64 - 5, cupy.asarray(indices)))
    want = kernels.random_normal(2**64 - 5, indices)
    return None if found.tobytes() == want.tobytes() else f"{int((found != want).sum())} of {len(want)} normals differ from NumPy's"


def sanitize(tests: Path, deadline: float = SANITIZER_SECONDS + SANITIZER_START) -> dict[str, Any]:
    """The small cases once more under compute-sanitizer's memory checker, where it is installed, if it can end in `deadline` seconds."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"outcome": "left out", "words": "compute-sanitizer is not on this machine"}
    seconds = min(SANITIZER_SECONDS, int(deadline) - SANITIZER_START)
    if seconds <= 0:
        return {"outcome": "not run", "words": "no time"}
    program = [sys.executable, "-m", "minillm.kernels.gpu_check.checks", str(tests), str(seconds)]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "86", *program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + SANITIZER_START)
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "words": f"no end within {seconds + SANITIZER_START} s"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    outcome = "ok" if done.returncode == 0 else "failed"
    return {"outcome": outcome, "words": " | ".join(lines[-1:] if outcome == "ok" else lines[-12:])}


def main() -> int:
    """What runs under the sanitizer: small cases, once each, without the memory pool, in which nothing ends where its array ends."""
    importlib.import_module("cupy").cuda.set_allocator(None)
    found = run(Path(sys.argv[1]), repeats=1, most_elements=SANITIZER_ELEMENTS, deadline=float(sys.argv[2]))
    print(f"{found['ran']} cases, {len(found['failures'])} failures, no time for {found['no_time']}")
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
