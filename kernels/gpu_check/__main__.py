"""Program behind `kernels/gpu_check.sh`: tests and timings of the kernels on a GPU.

Prints each section when it ends, and writes all results as JSON and as Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minillm.kernels.gpu import build, registering
from minillm.kernels.gpu.launching import compute_capability
from minillm.kernels.gpu_check import attention, checks, measure, report, smoke, steps

SECTIONS = ("ceilings", "smoke", "tests", "attention", "steps", "sanitizer", "training")
# Parts run in processes of their own: a kernel error can break the CUDA context of its process.
PARTS = ("ceilings", "smoke", "random", "attention v2", "attention v3", "steps")
SHORT_SECONDS = 60  # timeout of a part that has seconds of work
# Each of the two calls in the documentation ends within ten minutes, the longest that a lent
# machine often grants one command.
KERNEL_SECONDS = 540  # budget of all sections but training, compilation included
START_SECONDS = 15  # start of a process, added to its timeout
STEPS_SECONDS = 30  # of KERNEL_SECONDS, reserved for the section "steps"
TRAINING_SECONDS = 540  # budget of the section "training"
NO_GPU = 2  # exit status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status.

    0: no problem; 1: a test failed or was not run; 2: no GPU.
    """
    parser = argparse.ArgumentParser(
        prog="kernels/gpu_check.sh",
        description="Test and time the CUDA kernels on this machine's GPU.",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[2],
        help="checkout that holds tests/kernels",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: docs/gpu-results in the checkout)",
    )
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="sections to run (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=checks.REPEATS,
        help="calls of each test case, which must return the same bits",
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=SHORT_SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--copy-tbs", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return _run_part(args.part, args.json, args.seconds, args.copy_tbs)
    wanted = [name.strip() for name in args.only.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    reason = no_gpu()
    if reason:
        words = f"gpu_check needs a machine with an NVIDIA GPU, CuPy and NVRTC: {reason}"
        print(words, file=sys.stderr)
        return NO_GPU
    folder = args.out or args.root / "docs" / "gpu-results"
    found = run(wanted, args.root, args.repeats, lambda found: write(found, folder))
    for path in write(found, folder):
        print(f"wrote {path}")
    problems = report.failed(found)
    print("\n".join(f"PROBLEM {words}" for words in problems) or "no problem found")
    return int(bool(problems))


def no_gpu() -> str | None:
    """Return why the kernels cannot run on this machine, or None if they can."""
    if registering.unavailable is not None:
        return registering.unavailable
    try:
        count = importlib.import_module("cupy").cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy finds no device: {error}"
    return None if count else "CuPy finds no device"


def run(
    wanted: Sequence[str],
    root: Path,
    repeats: int,
    save: Callable[[report.Found], Any] = lambda found: None,
) -> report.Found:
    """Run the sections `wanted`, in the order of SECTIONS, and return their results.

    `save` gets the results after each section. A section that fails is reported and does not stop
    the others. Sections that launch kernels run in processes of their own: a kernel may hang, or
    break the CUDA context of its process.
    """
    start = time.perf_counter()
    tests = root / "tests" / "kernels"
    found: report.Found = {
        "commit": commit(root),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device(),
        "software": software(),
        "problems": [],
    }
    print(
        json.dumps({**found["device"], **found["software"], "commit": found["commit"]}, indent=1),
        flush=True,
    )

    def left() -> float:
        return start + KERNEL_SECONDS - time.perf_counter()

    problems = found["problems"]

    def copy_tbs() -> float:
        return float((found.get("ceilings") or {}).get("copy_tbs") or 0)

    sections: dict[str, Callable[[], Any]] = {
        "ceilings": lambda: _apart("ceilings", min(SHORT_SECONDS, left()), problems),
        "smoke": lambda: _apart("smoke", min(SHORT_SECONDS, left()), problems),
        "tests": lambda: _tests(tests, repeats, left, problems),
        "attention": lambda: _attention(left, problems),
        "steps": lambda: _apart("steps", left(), problems, f"--copy-tbs={copy_tbs()}"),
        "sanitizer": lambda: checks.sanitize(tests, left()),
        "training": lambda: _training(problems),
    }
    for name in SECTIONS:
        if name not in wanted:
            continue
        if name != "training" and left() <= 0:
            found["problems"].append(
                f"section {name}: not run, the {KERNEL_SECONDS} s for the kernels are spent"
            )
            continue
        found[name] = _section(name, sections[name], start, problems)
        found["seconds"] = time.perf_counter() - start
        save(found)
    found["seconds"] = time.perf_counter() - start
    return found


def _apart(name: str, seconds: float, problems: list[str], *options: str) -> Any:
    """Run a part in a process of its own, for at most `seconds`, and return its results.

    If it fails or times out, the results until then count, and `problems` gets a line. Raises
    RuntimeError if there are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "minillm.kernels.gpu_check",
            "--part",
            name,
            "--json",
            str(path),
            f"--seconds={seconds:.0f}",
        ]
        words = _ended([*command, *options], seconds + START_SECONDS)
        if not path.exists():
            raise RuntimeError(words or "no results")
        if words:
            problems.append(f"{name}: {words}; partial results kept")
        return json.loads(path.read_text(encoding="utf-8"))


def _ended(command: Sequence[str], seconds: float) -> str | None:
    """Run a program. Returns its failure in one line, or None if it succeeded."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"timed out after {seconds:.0f} s"
    return (
        f"exit status {done.returncode}: {done.stderr.strip()[-400:]}" if done.returncode else None
    )


def _run_part(name: str, path: Path, seconds: float, copy_tbs: float) -> int:
    """Run one part in this process, and write its results to `path` as JSON.

    `path` is replaced atomically: it never holds half of the results. Returns the exit status.
    """

    def save(found: Any) -> None:
        measure.save_json(path, found)

    parts: dict[str, Callable[[], Any]] = {
        "ceilings": measure.ceilings,
        "smoke": smoke.run,
        "random": checks.random_bits_agree,
        "attention v2": lambda: attention.run("v2", deadline=seconds, save=save),
        "attention v3": lambda: attention.run("v3", deadline=seconds, save=save),
        "steps": lambda: steps.run(copy_tbs or measure.ceilings()["copy_tbs"], seconds, save),
    }
    save(parts[name]())
    return 0


def _attention(left: Callable[[], float], problems: list[str]) -> attention.Found:
    """Time our variants and PyTorch's back ends, and return the table.

    `left` returns the seconds that remain. A part that fails does not discard the others' rates.
    """
    found = attention.empty()
    for number, name in enumerate(("attention v2", "attention v3")):
        try:
            attention.add(found, _apart(name, (left() - STEPS_SECONDS) / (4 - number), problems))
        except RuntimeError as error:
            problems.append(f"{name}: {error}")
    attention.add(
        found, attention.torch(timeout=min(attention.TORCH_SECONDS, left() - STEPS_SECONDS))
    )
    return found


def _section(name: str, run: Callable[[], Any], start: float, problems: list[str]) -> Any:
    """Run one section and print its results. Returns None, with a problem, if it failed."""
    print(f"\n==== {name} ({time.perf_counter() - start:.0f} s so far)", flush=True)
    try:
        found = run()
    except Exception as error:
        problems.append(f"section {name}: {report.error_line(error)}")
        print(f"failed: {problems[-1]}", flush=True)
        return None
    print(json.dumps(found, indent=1)[:20000], flush=True)
    return found


def _training(problems: list[str]) -> dict[str, Any]:
    """Run `minillm.bench.gpu`, which trains on this GPU and compares with PyTorch.

    Returns its results, `page` (Markdown) among them. Raises RuntimeError if there are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.json"
        command = [sys.executable, "-m", "minillm.bench.gpu", "--json", str(path)]
        words = _ended(command, TRAINING_SECONDS)
        if not path.exists():
            raise RuntimeError(f"minillm.bench.gpu: {words}")
        # A nonzero exit status has its reason in found["problems"].
        if words and words.startswith("timed out"):
            problems.append(f"training: {words}")
        # The program rewrites the file after each of its sections.
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    problems += [f"training, {words}" for words in found["problems"]]
    return found


def _tests(
    tests: Path, repeats: int, left: Callable[[], float], problems: list[str]
) -> dict[str, Any]:
    """Compile all kernels in parallel, then run all cases.

    `left` returns the seconds that remain. Returns `checks.summary`, `repeats` and `seconds`.
    """
    command = [
        sys.executable,
        "-m",
        "minillm.kernels.gpu.precompile",
        "--capability",
        compute_capability(),
        f"--seconds={left() / 2:.0f}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    start = time.perf_counter()
    runner = [sys.executable, "-m", "minillm.kernels.gpu_check.checks", str(tests), str(repeats)]
    found = checks.summary(checks.run_apart(runner, min(checks.SECONDS, left())))
    found |= {"repeats": repeats, "seconds": time.perf_counter() - start}
    if done.returncode:
        lines = [
            line for line in done.stdout.splitlines() if "FAILED" in line
        ] or done.stderr.splitlines()[-3:]
        found["failures"] += [{"case": "build", "words": line} for line in lines]
    try:
        words = _apart("random", SHORT_SECONDS, problems)
    except RuntimeError as error:
        words = str(error)
    if words:
        found["failures"].append({"case": "random_normal", "words": words})
    return found


def device() -> dict[str, Any]:
    """Return the name and the properties of the GPU."""
    runtime = importlib.import_module("cupy").cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    name = properties["name"]
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "capability": compute_capability(),
        "processors": int(properties["multiProcessorCount"]),
        "memory": f"{properties['totalGlobalMem'] / 2**30:.0f} GiB",
        "devices": int(runtime.getDeviceCount()),
    }


def software() -> dict[str, str]:
    """Return the versions of the software involved."""
    cupy = importlib.import_module("cupy")
    # In a process of its own: an MPI library that fails to start may abort the process.
    mpi = (
        "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
        "print(MPI.Get_library_version().strip('\\0'))"
    )
    return {
        "Python": platform.python_version(),
        "CuPy": cupy.__version__,
        "CUDA driver": _release(cupy.cuda.runtime.driverGetVersion()),
        "CUDA runtime": _release(cupy.cuda.runtime.runtimeGetVersion()),
        "NVRTC": build.nvrtc_version(),
        "NVIDIA driver": _output(
            [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            ]
        ),
        "MPI": _output([sys.executable, "-c", mpi]),
    }


def _release(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _output(command: Sequence[str]) -> str:
    """Return the first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def commit(root: Path) -> str:
    """Return $MINILLM_COMMIT, else the commit of the checkout, else "unknown".

    A checkout with modified files is marked "with changes".
    """
    named = os.environ.get("MINILLM_COMMIT")
    if named:
        return named
    head = _output(["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"])
    if not re.fullmatch(r"[0-9a-f]{7,40}", head):
        return "unknown"
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head if changed == "unknown" else f"{head} with changes"


def write(found: report.Found, folder: Path) -> list[Path]:
    """Write the results as JSON and as Markdown into `folder`, and return the two paths.

    Device, commit and time make the names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = (found["device"]["name"], found["commit"].split()[0], found["date"][:16])
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(words)).strip("-").lower()
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(report.markdown(found), encoding="utf-8")
    return paths


if __name__ == "__main__":
    sys.exit(main())
