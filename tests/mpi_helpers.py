"""Launches of programs under mpirun, whose processes end with their test, and no others."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest

from minillm.comm.launchers import mpi_family

MPIRUN = shutil.which(
    "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)

CALLS = str(Path(__file__).with_name("calls_program.py"))
PLANTED = str(Path(__file__).with_name("planted_program.py"))

needs_mpirun = pytest.mark.skipif(
    MPIRUN is None, reason="no mpirun; install one with: pip install -e '.[mpich]'"
)

PATIENCE = 100.0  # seconds: longer than any wait of a busy machine, shorter than --comm-timeout
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_", "HYDRA_")


@cache
def family() -> str | None:
    """Return the family of this environment's mpirun, such as "MPICH"; None without one."""
    if MPIRUN is None:
        return None
    words = [MPIRUN, "--version"]
    told = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
    return mpi_family(told.stdout + told.stderr)


@dataclass
class Finished:
    """Finished launch: exit status, standard output and error together."""

    returncode: int
    output: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a launch: one thread a rank.

    It holds no trace of a launcher around the tests.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    return (
        clean
        | OPEN_MPI
        | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        | dict(extra or {})
    )


class Launch(subprocess.Popen[str]):
    """Command in a process group of its own, with the output and the error in one pipe.

    `end_launches` ends it, and all processes that it has started, at the end of the test.
    """

    MARK = "MINILLM_TEST_LAUNCH"  # variable of the environment, which its processes inherit
    every: ClassVar[list[Launch]] = []

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self.mark = f"{self.MARK}={uuid.uuid4().hex}"
        self.read = b""  # output that `wait_for` has read
        usual: dict[str, Any] = dict(
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        named = environment(env) | {self.MARK: self.mark.partition("=")[2]}
        super().__init__(command, env=named, **(usual | options))
        self.every.append(self)

    def wait_for(self, words: str) -> None:
        """Read the output until it holds `words`; fail the test if that does not happen."""
        assert self.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while words.encode() not in self.read:
            left = max(0.0, deadline - time.monotonic())
            piece = b""
            if select.select([self.stdout], [], [], left)[0]:
                piece = os.read(self.stdout.fileno(), 65536)
            if not piece:
                self.fail(f"{words!r} was not printed")
            self.read += piece

    def fail(self, why: str) -> NoReturn:
        """End the launch, and fail the test with its output."""
        _kill({self.mark.encode()})
        pytest.fail(f"{why}; its output so far:\n{self.output()}")

    def output(self, timeout: float | None = None) -> str:
        """Wait for the end, and return all output. Raises subprocess.TimeoutExpired."""
        rest, _ = self.communicate(timeout=timeout)
        return self.read.decode() + (rest or "")


def end_launches() -> None:
    """Kill all processes of all launches that still run."""
    _kill({launch.mark.encode() for launch in Launch.every})
    for launch in Launch.every:
        launch.wait()
        for stream in (launch.stdout, launch.stderr):
            if stream is not None:
                stream.close()
    Launch.every.clear()


def _kill(marks: set[bytes]) -> None:
    """Kill the processes with one of these `marks`, and those that they start meanwhile."""
    while marks and (found := [pid for pid, own in _processes("environ") if marks & {*own}]):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def start(
    n: int,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    flags: Sequence[str] = (),
) -> Launch:
    """Start `mpirun FLAGS -n N python ARGS`. n = 0 starts plain `python ARGS`."""
    launcher = [str(MPIRUN), *flags, "-n", str(n)] if n else []
    return Launch([*launcher, sys.executable, *args], env, cwd=cwd)


def finish(process: Launch, timeout: float = PATIENCE) -> Finished:
    """Wait for a launch, and fail the test if it takes longer than `timeout` seconds.

    The launch is ended first.
    """
    try:
        output = process.output(timeout)
    except subprocess.TimeoutExpired:
        process.fail(f"still running after {timeout} s")
    return Finished(process.returncode, output)


def mpirun(
    n: int,
    args: Sequence[str],
    timeout: float = PATIENCE,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run `mpirun -n N python ARGS` to its end."""
    return finish(start(n, args, env, cwd), timeout)


def mpirun_calls(
    n: int, calls: Sequence[Sequence[str]], timeout: float = PATIENCE
) -> list[Finished]:
    """Run the `main` of several modules, one after another in the same `n` ranks.

    A call is the module's name and its arguments. Starting ranks takes longer than to refuse a
    call.
    """
    done = mpirun(n, [CALLS, json.dumps(calls)], timeout)
    found = [json.loads(line) for line in done.output.splitlines() if line.startswith("[")]
    assert done.returncode == 0 and len(found) == len(calls), done.output
    return [Finished(status, output) for status, output in found]


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Look at a condition until it is true; fail the test with `what` if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what or "the condition has not become true"
        time.sleep(0.005)


def wait_for_steps(process: Launch, run: Path, steps: int = 3) -> None:
    """Wait until the run has written `steps` lines of metrics; fail the test if it stands still."""
    metrics, done, changed = run / "metrics.jsonl", 0, time.monotonic()
    while True:
        ended, before = process.poll() is not None, done
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        if done >= steps:
            return
        changed = changed if done == before else time.monotonic()
        if ended or time.monotonic() > changed + PATIENCE:
            process.fail(f"the run has not come to step {steps}")
        time.sleep(0.02)


def left_behind(marker: Path, seconds: float = 5.0) -> list[str]:
    """Return the processes that do not end within `seconds`.

    Their command line holds the path `marker`.
    """
    deadline = time.monotonic() + seconds
    while (found := _running(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(marker: Path) -> list[str]:
    commands = (b"\0".join(words) for _, words in _processes("cmdline"))
    return [each.decode(errors="replace") for each in commands if str(marker).encode() in each]


def _processes(what: str) -> Iterator[tuple[int, list[bytes]]]:
    """Yield each process with the words in its "cmdline" or "environ", as far as we may look."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(path.name), (path / what).read_bytes().split(b"\0")
