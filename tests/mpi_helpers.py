"""Launches of programs under mpirun, with a time-out that ends their own processes alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

MPIRUN = shutil.which(
    "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)

CALLS = str(Path(__file__).with_name("calls_program.py"))
PLANTED = str(Path(__file__).with_name("planted_program.py"))

needs_mpirun = pytest.mark.skipif(
    MPIRUN is None, reason="no mpirun; install one with: pip install -e '.[mpich]'"
)

OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
_LAUNCHED = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_", "HYDRA_")


@dataclass
class Finished:
    """Finished launch: exit status, standard output and error together, seconds."""

    returncode: int
    output: str
    seconds: float


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a launch: one thread a rank.

    It holds no trace of a launcher around the tests.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
    return (
        clean
        | OPEN_MPI
        | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        | dict(extra or {})
    )


def start(
    n: int,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    flags: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start `mpirun FLAGS -n N python ARGS` in a process group of its own.

    n = 0 starts plain `python ARGS`.
    """
    launcher = [str(MPIRUN), *flags, "-n", str(n)] if n else []
    command = [*launcher, sys.executable, *args]
    return subprocess.Popen(
        command,
        env=environment(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Finished:
    """Wait for a launch, and fail the test if it takes longer than `timeout` seconds.

    The launch is ended first.
    """
    started = time.monotonic()
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s; its output so far:\n{output}")
    return Finished(process.returncode, output, time.monotonic() - started)


def mpirun(
    n: int,
    args: Sequence[str],
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run `mpirun -n N python ARGS` to its end."""
    return finish(start(n, args, env, cwd), timeout)


def mpirun_calls(n: int, calls: Sequence[Sequence[str]], timeout: float = 60) -> list[Finished]:
    """Run the `main` of several modules, one after another in the same `n` ranks.

    A call is the module's name and its arguments. Starting ranks takes longer than to refuse a
    call.
    """
    done = mpirun(n, [CALLS, json.dumps(calls)], timeout)
    found = [json.loads(line) for line in done.output.splitlines() if line.startswith("[")]
    assert done.returncode == 0 and len(found) == len(calls), done.output
    return [Finished(status, output, done.seconds) for status, output in found]


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int = 3) -> None:
    """Wait until the run has written `steps` lines of metrics."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run has not come to its steps"
        )
        time.sleep(0.05)


def left_behind(marker: Path, seconds: float = 5.0) -> list[str]:
    """Return the processes that do not end within `seconds`.

    Their command line holds the path `marker`.
    """
    deadline = time.monotonic() + seconds
    while (found := _running(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(marker: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if str(marker).encode() in command:
            found.append(command.decode(errors="replace"))
    return found
