"""Kernel tests on the device: every case of the operation folders, with poisoned outputs.

Repeated calls of a case must return the same bits.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.case import all_cases
from minillm.kernels.gpu_check.report import error_line
from minillm.kernels.registry import KernelUnavailable

REPEATS = 10
SECONDS = 110.0
DTYPES = ("float32", "bfloat16", "float16")
SANITIZER_ELEMENTS = 20_000  # of a case's inputs: the sanitizer makes a kernel 100 times slower
SANITIZER_SECONDS = 45
SANITIZER_START = 30  # seconds until the first case
CASE_SECONDS = 30  # timeout of one case, its compilation included
START_SECONDS = 60  # timeout of the start of a worker
MOST_HANGS = 2  # timeouts of one implementation before its other cases are left out
MOST_STARTS = 20  # worker processes
CONTEXT_LOST = 3  # exit status of a worker whose CUDA context is broken


class Result(NamedTuple):
    """Outcome of a case: "ok", "failed", "left out" (another device's), "no time" or "begun"."""

    number: int
    case: str
    implementation: str
    outcome: str
    words: str = ""


def run(
    tests: Path,
    repeats: int = REPEATS,
    most_elements: int | None = None,
    deadline: float = SECONDS,
    device: Any = None,
    source: str = "cuda",
) -> dict[str, Any]:
    """Run the cases in the folder `tests`, for at most `deadline` seconds.

    They run on `device`, by default the GPU, with the kernels of backend `source`. Cases with more
    than `most_elements` elements of input are left out. Returns `summary`, `repeats` and `seconds`.
    Registers the device's kernels.
    """
    device_arrays, _ = _import(tests)
    device = device or device_arrays.CupyDevice()
    device_arrays.register(device, source)
    start = time.perf_counter()
    found = list(results(list(crossing(tests, most_elements)), tests, repeats, deadline, device))
    return {**summary(found), "repeats": repeats, "seconds": time.perf_counter() - start}


def results(
    todo: Sequence[tuple[Any, str, str]],
    tests: Path,
    repeats: int,
    deadline: float,
    device: Any,
    first: int = 0,
    skipped: Sequence[str] = (),
) -> Iterator[Result]:
    """Run the cases of `todo` from number `first` on, and yield their results.

    Each case yields "begun" first. Cases of the implementations `skipped` are left out. After
    `deadline` seconds the remaining cases yield "no time".
    """
    _, kernel_check = _import(tests)
    start = time.perf_counter()
    with contextlib.ExitStack() as poisoned:
        for module in {id(m): m for m in (np, device.module)}.values():
            poisoned.enter_context(kernel_check.poisoned_memory(module))
        for index, (case, choice, dtype) in list(enumerate(todo))[first:]:
            begun = Result(index, f"{case}-{choice}-{dtype}", f"{case.op} {choice}", "begun")
            if begun.implementation in skipped:
                yield begun._replace(
                    outcome="left out",
                    words=f"{begun.implementation}: timed out {MOST_HANGS} times",
                )
                continue
            if time.perf_counter() - start > deadline:
                yield begun._replace(outcome="no time")
                continue
            yield begun
            try:
                kernel_check.check_case(case, choice, dtype, repeats=repeats)
            except KernelUnavailable as reason:
                yield begun._replace(
                    outcome="left out", words=f"{choice}: {' '.join(str(reason).split())[:200]}"
                )
            except Exception as error:
                yield begun._replace(outcome="failed", words=_words(error))
            else:
                yield begun._replace(outcome="ok")


def summary(found: Sequence[Result]) -> dict[str, Any]:
    """Count the results, and list the failures and the reasons to leave cases out."""
    failures = [{"case": r.case, "words": r.words} for r in found if r.outcome == "failed"]
    left_out = sorted({r.words for r in found if r.outcome == "left out"})
    count = collections.Counter(r.outcome for r in found)
    return {
        "ran": count["ok"] + count["failed"],
        "failures": failures,
        "left_out": left_out,
        "no_time": count["no time"],
    }


# ---- worker processes


def run_apart(
    command: Sequence[str],
    deadline: float,
    case_seconds: float = CASE_SECONDS,
    start_seconds: float = START_SECONDS,
) -> list[Result]:
    """Run all cases in worker processes that print their results, and return these.

    `command` starts a worker; its last argument becomes the task as JSON. A case that times out or
    breaks the device fails and ends its worker. Another worker continues with the next case. After
    MOST_HANGS timeouts of an implementation its other cases are left out. All times are in seconds.
    """
    end = time.perf_counter() + deadline
    found: list[Result] = []
    hangs: collections.Counter[str] = collections.Counter()

    def lost(what: str, words: str) -> Result:
        return Result(found[-1].number + 1 if found else 0, what, "", "failed", words)

    for _ in range(MOST_STARTS):
        skipped = [name for name, count in hangs.items() if count >= MOST_HANGS]
        task = {
            "first": found[-1].number + 1 if found else 0,
            "skipped": skipped,
            "deadline": end - time.perf_counter(),
        }
        finished, last = _follow(
            [*command, json.dumps(task)], found, end, case_seconds, start_seconds
        )
        if finished:
            return found
        if last is None:
            return [*found, lost("all further cases", "the worker process does not start")]
        if last.outcome == "begun":
            hangs[last.implementation] += 1
            found.append(
                last._replace(
                    outcome="failed",
                    words=f"timed out after {case_seconds:.0f} s, or its process died",
                )
            )
    return [*found, lost("all further cases", f"given up after {MOST_STARTS} processes")]


def _follow(
    command: Sequence[str],
    found: list[Result],
    end: float,
    case_seconds: float,
    start_seconds: float,
) -> tuple[bool, Result | None]:
    """Add the results of one worker to `found`, in place, until it ends or times out.

    Returns True if the worker finished its task, and its last result.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    stdout = process.stdout

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last, patience = None, start_seconds
    try:
        while (
            line := lines.get(
                timeout=max(1.0, min(patience, end + case_seconds - time.perf_counter()))
            )
        ) is not None:
            if not line.startswith("["):
                continue
            last, patience = Result(*json.loads(line)), case_seconds
            if last.outcome != "begun":
                found.append(last)
        return process.wait(case_seconds) == 0, last
    except (queue.Empty, subprocess.TimeoutExpired):
        return False, last
    finally:
        process.kill()
        process.wait()


def worker(
    tests: Path, repeats: int, task: dict[str, Any], device: Any = None, source: str = "cuda"
) -> int:
    """Run the cases of `task` and print each result as a line of JSON.

    `task` holds `first`, `skipped` and `deadline`, the arguments of `results`. Returns the exit
    status: 0, or CONTEXT_LOST after a case that broke the device.
    """
    device_arrays, _ = _import(tests)
    device = device or device_arrays.CupyDevice()
    device_arrays.register(device, source)
    newest = ("device:auto", "device:v3")  # last: the newest kernels are the likeliest to hang
    todo = sorted(
        crossing(tests), key=lambda run: newest.index(run[1]) + 1 if run[1] in newest else 0
    )
    for result in results(
        todo, tests, repeats, task["deadline"], device, task["first"], task["skipped"]
    ):
        print(json.dumps(result), flush=True)
        if result.outcome == "failed" and not _answers(device):
            return CONTEXT_LOST
    return 0


def _answers(device: Any) -> bool:
    """Return True if the device still works.

    Some errors, such as an access outside all arrays, break the CUDA context of a process.
    """
    if device.module is np:
        return True
    try:
        device.module.cuda.Device().synchronize()
    except Exception:
        return False
    return True


# ---- cases


def crossing(
    tests: Path, most_elements: int | None = None, backend: str = "device"
) -> Iterator[tuple[Any, str, str]]:
    """Yield (case, choice, dtype) of every run: all cases by all implementations of `backend`.

    Cases with more than `most_elements` elements of input are left out.
    """
    _, kernel_check = _import(tests)
    for case in all_cases():
        if (
            most_elements is not None
            and sum(x.size for x in case.inputs(np.random.default_rng(0))) > most_elements
        ):
            continue
        for dtype in DTYPES:
            for choice in kernel_check.implementations(case, dtype, (backend,)):
                yield case, choice, dtype


def _import(tests: Path) -> tuple[Any, Any]:
    if str(tests) not in sys.path:
        sys.path.insert(0, str(tests))
    return importlib.import_module("device_arrays"), importlib.import_module("kernel_check")


def _words(error: Exception) -> str:
    """Return the error and its place in the kernels, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "kernels" in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return error_line(error) + where


def random_bits_agree() -> str | None:
    """Compare 100,000 addressed normals with NumPy's. Returns the difference, or None."""
    from minillm import kernels

    cupy = importlib.import_module("cupy")
    indices = np.r_[np.arange(50_000), np.random.default_rng(0).integers(0, 2**63, 50_000)].astype(
        np.uint64
    )
    found = cupy.asnumpy(kernels.random_normal(2**64 - 5, cupy.asarray(indices)))
    want = kernels.random_normal(2**64 - 5, indices)
    return (
        None
        if found.tobytes() == want.tobytes()
        else f"{int((found != want).sum())} of {len(want)} normals differ from NumPy's"
    )


def sanitize(tests: Path, deadline: float = SANITIZER_SECONDS + SANITIZER_START) -> dict[str, Any]:
    """Run the small cases under the memory checker of compute-sanitizer.

    They are left out if it is not installed, and not run if `deadline` seconds are too few. Returns
    `outcome` and `words`.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return {"outcome": "left out", "words": "compute-sanitizer is not installed"}
    seconds = min(SANITIZER_SECONDS, int(deadline) - SANITIZER_START)
    if seconds <= 0:
        return {"outcome": "not run", "words": "no time"}
    program = [sys.executable, "-m", "minillm.kernels.gpu_check.checks", str(tests), str(seconds)]
    # CuPy queries attributes that a device may lack and handles the error: it is none of ours.
    command = [
        tool,
        "--tool",
        "memcheck",
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "86",
        *program,
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + SANITIZER_START
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "words": f"timed out after {seconds + SANITIZER_START} s"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    outcome = "ok" if done.returncode == 0 else "failed"
    return {"outcome": outcome, "words": " | ".join(lines[-1:] if outcome == "ok" else lines[-12:])}


def main() -> int:
    """Run the worker, or, without a task as third argument, the cases under the sanitizer.

    The sanitizer gets small cases, once each, without CuPy's memory pool: an access beyond an array
    of the pool is still inside an allocation.
    """
    if len(sys.argv) > 3:
        return worker(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    importlib.import_module("cupy").cuda.set_allocator(None)
    found = run(
        Path(sys.argv[1]), repeats=1, most_elements=SANITIZER_ELEMENTS, deadline=float(sys.argv[2])
    )
    print(
        f"{found['ran']} cases, {len(found['failures'])} failures, no time for {found['no_time']}"
    )
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
