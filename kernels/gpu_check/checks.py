"""All kernel tests on the device: every case of tests/kernels, poisoned outputs, the same bits
every time."""

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
from minillm.kernels.registry import KernelUnavailable

REPEATS = 10
SECONDS = 110.0
DTYPES = ("float32", "bfloat16", "float16")
SANITIZER_ELEMENTS = 20_000  # of a case's inputs: the sanitizer slows a kernel down a hundredfold
SANITIZER_SECONDS = 45
SANITIZER_START = 30  # seconds until the first case
CASE_SECONDS = 30  # for one case, its compilation included, before it counts as hung
START_SECONDS = 60  # until the first
MOST_HANGS = 2  # of one implementation, whose other cases are then left out
MOST_STARTS = 20
CONTEXT_LOST = 3  # exit status of a process whose device answers no more


class Result(NamedTuple):
    """What became of a case: ok, failed, left out (a kernel for another device), no time, or just
    begun."""

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
    """Run the cases in the folder `tests` on `device`, by default the GPU, with the kernels of
    backend `source`, for at most `deadline` seconds. Returns how many ran, the failures with their
    words, and how many there was no time for."""
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
    """Run what is `todo` from number `first` on, for at most `deadline` seconds, without the
    implementations `skipped`."""
    _, kernel_check = _import(tests)
    start = time.perf_counter()
    with contextlib.ExitStack() as poisoned:
        for module in {id(m): m for m in (np, device.module)}.values():
            poisoned.enter_context(kernel_check.poisoned_memory(module))
        for index, (case, choice, dtype) in list(enumerate(todo))[first:]:
            begun = Result(index, f"{case}-{choice}-{dtype}", f"{case.op} {choice}", "begun")
            if begun.implementation in skipped:
                yield begun._replace(
                    outcome="left out", words=f"{begun.implementation}: hung {MOST_HANGS} times"
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
    """How many ran, the failures, what was left out, and for how many there was no time."""
    failures = [{"case": r.case, "words": r.words} for r in found if r.outcome == "failed"]
    left_out = sorted({r.words for r in found if r.outcome == "left out"})
    count = collections.Counter(r.outcome for r in found)
    return {
        "ran": count["ok"] + count["failed"],
        "failures": failures,
        "left_out": left_out,
        "no_time": count["no time"],
    }


# ---- in processes of their own


def run_apart(
    command: Sequence[str],
    deadline: float,
    case_seconds: float = CASE_SECONDS,
    start_seconds: float = START_SECONDS,
) -> list[Result]:
    """The results of all cases from processes that print them (`worker`). A case that hangs, or
    after which the device answers no more, ends its process: it counts as failed, and another
    process goes on with the next case. After some hangs of an implementation its other cases are
    left out."""
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
            return [*found, lost("all further cases", "the process that runs them does not start")]
        if last.outcome == "begun":
            hangs[last.implementation] += 1
            found.append(
                last._replace(
                    outcome="failed",
                    words=f"no end within {case_seconds:.0f} s, or its process ended with it",
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
    """Add what a process prints to `found` until it ends or hangs. Returns whether it did all there
    was to do, and the last it said."""
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
    """Run cases and print their results, a line each. Returns an exit status: CONTEXT_LOST after a
    case that broke the device."""
    device_arrays, _ = _import(tests)
    device = device or device_arrays.CupyDevice()
    device_arrays.register(device, source)
    newest = ("device:auto", "device:v3")  # which may well hang, and come last
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
    """Whether the device can still be used: after some errors, such as an access outside all
    arrays, a process can do nothing there."""
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
    """Case, choice and dtype of everything there is to run; small cases only where `most_elements`
    says so."""
    _, kernel_check = _import(tests)
    for case in importlib.import_module("kernel_cases").all_cases():
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
    """The error and where it came from, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "kernels" in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def random_bits_agree() -> str | None:
    """Whether addressed normals have NumPy's bits; what is wrong if not."""
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
    """The small cases once more under compute-sanitizer's memory checker, where it is installed, if
    it can end in `deadline` seconds."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return {"outcome": "left out", "words": "compute-sanitizer is not on this machine"}
    seconds = min(SANITIZER_SECONDS, int(deadline) - SANITIZER_START)
    if seconds <= 0:
        return {"outcome": "not run", "words": "no time"}
    program = [sys.executable, "-m", "minillm.kernels.gpu_check.checks", str(tests), str(seconds)]
    # CuPy asks for attributes that a device may lack, and takes no for an answer: no error of ours.
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
        return {"outcome": "failed", "words": f"no end within {seconds + SANITIZER_START} s"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    outcome = "ok" if done.returncode == 0 else "failed"
    return {"outcome": outcome, "words": " | ".join(lines[-1:] if outcome == "ok" else lines[-12:])}


def main() -> int:
    """With a task as third argument (`run_apart`), the cases that it names. Without: what runs
    under the sanitizer, small cases, once each, without the memory pool, in which nothing ends
    where its array ends."""
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
