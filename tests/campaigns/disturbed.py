"""Runs that are disturbed, go on, and are compared with an undisturbed one.

Every campaign gives its processes a mark in their environment, a folder of their own for temporary
files, and where root allows it a /dev/shm of their own. So what a run leaves behind is known to be
its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mpi_helpers
import numpy as np

from minillm import checkpoint
from minillm.base.lock import FolderLock, FolderTaken
from minillm.base.metrics_file import METRICS
from minillm.comm import leftovers
from minillm.comm.single import SelfCommunicator
from minillm.models.protocol import INIT_STD
from minillm.training.config import RunConfig
from minillm.training.replay import LoneWorker, read_logs, replay
from minillm.training.resolve import resolve

VICTIM = str(Path(__file__).with_name("victim.py"))
TRAIN = ("-m", "minillm.train")
MARK = "MINILLM_CAMPAIGN"  # in the environment of every process of a campaign
STEPS, SAVES, EVALUATIONS = 30, 5, 10  # of a run, and the steps between two
SIZES = "--layers 2 --dim 16 --context 16 --batch 8 --eval-tokens 64 --sample-tokens 0"
FLAGS = [*SIZES.split(), "--steps", str(STEPS), "--save-every", str(SAVES)]
FLAGS += ["--eval-every", str(EVALUATIONS), "--warmup", "5"]
PARTS = (".tmp-*", "*.tmp", "run.lock", "heartbeats")  # of unfinished work
LINES = "".join(f"line {i}: {i * i}\n" for i in range(300))
MAPPED = re.compile(  # line of /proc/PID/maps: addresses, offset, inode
    rf"(\w+)-(\w+) \S+ (\w+) \S+ (\d+)\s+{leftovers.SHARED_MEMORY}/"
)
NAMESPACE = 0x00020000  # CLONE_NEWNS of unshare(2)


@dataclass(frozen=True)
class Method:
    """Way to train, and its promise about a run that goes on."""

    name: str
    ranks: int  # 0: without mpirun
    words: tuple[str, ...]
    promise: str = "bits"  # or "rounding", or "log": equal to the replay of the servers' logs
    mpi: str = ""  # family that it needs
    mpirun: tuple[str, ...] = ()  # flags
    replica: int = 1  # ranks that hold a replica together

    @property
    def outlives(self) -> bool:
        """True if a run goes on after the loss of a rank."""
        return "--on-failure" in self.words


class Row(NamedTuple):
    """Numbers of a step, as metrics.jsonl has them."""

    step: int
    loss: float
    norm: float
    held_out: float | None


class Place(NamedTuple):
    """Folder of a run, with what surrounds it."""

    folder: Path

    @property
    def run(self) -> Path:
        """The folder of the run itself."""
        return self.folder / "run"

    @property
    def mark(self) -> str:
        """Value of MARK."""
        return str(self.folder)

    def environment(self) -> dict[str, str]:
        """Return what its processes have beside the environment of tests."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        return {MARK: self.mark, "TMPDIR": str(self.folder / "tmp")}


class Workplace(NamedTuple):
    """Folder of a campaign."""

    folder: Path
    note: str  # why /dev/shm is shared with other programs, "" if it is not

    @property
    def alone(self) -> bool:
        """True if no other program uses its /dev/shm."""
        return not self.note


@contextlib.contextmanager
def workplace(name: str) -> Iterator[Workplace]:
    """Yield a folder with a text, and as root a /dev/shm of its own.

    At the end, after an error, Ctrl-C and SIGTERM as well, its processes are killed and its files
    removed, those in that /dev/shm too.
    """
    usual = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    place = Workplace(Path(tempfile.mkdtemp(prefix=f"minillm-{name}-")), private_memory())
    try:
        write_text(place.folder)
        yield place
    finally:
        gone(str(place.folder), 0)
        gone(str(place.folder), 10)  # they write no more
        shutil.rmtree(place.folder, ignore_errors=True)
        for path in leftovers.SHARED_MEMORY.iterdir() if place.alone else []:
            with contextlib.suppress(OSError):
                path.unlink()
        signal.signal(signal.SIGTERM, usual)


def send(process: int, number: int) -> None:
    """Send a signal to a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def private_memory() -> str:
    """Give this process and its children a /dev/shm of their own; return why not, "" if done."""
    if os.geteuid() != 0:
        return "/dev/shm is shared with other programs, and was not looked at: this is not root"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NAMESPACE) != 0:
        return f"/dev/shm was not looked at: {os.strerror(ctypes.get_errno())}"
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=2g", "tmpfs", "/dev/shm"]):
        done = subprocess.run(["mount", *words], capture_output=True, text=True)
        if done.returncode:
            return f"/dev/shm was not looked at: {done.stderr.strip()}"
    return ""


def write_text(folder: Path) -> None:
    """Write the text that runs of a campaign read."""
    (folder / "text.txt").write_text(LINES)


def start(
    method: Method, place: Place, words: Sequence[str], before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a program under the method's mpirun; `before` stands before that, as a supervisor."""
    mpirun = [str(mpi_helpers.MPIRUN), *method.mpirun, "-n", str(method.ranks)]
    environment = mpi_helpers.environment(place.environment())
    log = (place.folder / "output.txt").open("a")
    with log:
        return subprocess.Popen(
            [*before, *(mpirun if method.ranks else []), sys.executable, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def wait(process: subprocess.Popen[str], place: Place, seconds: float) -> int | None:
    """Return the exit status; None, after its processes are killed, if it takes too long."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for number in living(place.mark):
            send(number, signal.SIGKILL)
        process.wait()
        return None


def output(place: Place) -> str:
    """Return all that the programs of a place have printed."""
    path = place.folder / "output.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def living(mark: str) -> list[int]:
    """Return the processes with this mark, or one of a folder in it, but for zombies."""
    wanted, found = f"{MARK}={mark}/".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "environ").read_bytes().split(b"\0")
            if any((word + b"/").startswith(wanted) for word in words):
                found.append(int(path.name))
    return found


def gone(mark: str, seconds: float) -> list[int]:
    """Return the processes with this mark that do not end within `seconds`, and kill them."""
    deadline = time.monotonic() + seconds
    while (found := living(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in found:
        send(number, signal.SIGKILL)
    return found


def shared_memory(processes: Iterable[int], alone: bool) -> int:
    """Return the bytes of /dev/shm in use: all of them if it is `alone`, else those mapped here."""
    if alone:
        found = os.statvfs(leftovers.SHARED_MEMORY)
        return (found.f_blocks - found.f_bfree) * found.f_frsize
    ends: dict[str, int] = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                if match := MAPPED.match(line):
                    first, last, offset = (int(text, 16) for text in match.groups()[:3])
                    end = last - first + offset
                    ends[match[4]] = max(end, ends.get(match[4], 0))
    return sum(ends.values())


def released(run: Path, seconds: float = 20.0) -> bool:
    """Return True once no process holds the lock of a run.

    A dying process gives its memory back, with its mark, before its files.
    """
    deadline = time.monotonic() + seconds
    while run.exists():
        try:
            FolderLock(run).release()
            break
        except FolderTaken:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return True


def curve(run: Path) -> list[Row]:
    """Return the numbers of all lines of the metrics."""
    path = run / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        x = json.loads(line)
        rows.append(Row(x["step"], x["loss"], x["grad_norm"], x.get("val_loss")))
    return rows


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    return max(checkpoint.run_steps(run), default=0)


def complete(run: Path) -> bool:
    """Return True if the run has come to its end."""
    return newest(run) == STEPS


def differences(found: Sequence[Row], whole: Sequence[Row], method: Method) -> Iterator[str]:
    """Yield how the metrics of a disturbed run break the promise of its method."""
    steps = [row.step for row in found]
    if steps != list(range(1, len(steps) + 1)):
        odd = next(i for i, step in enumerate(steps) if step != i + 1)
        yield f"line {odd + 1} of {METRICS} is of step {steps[odd]}"
        return
    if method.promise == "log":
        return
    for row, other in zip(found, whole, strict=False):
        same = row == other if method.promise == "bits" else _close(row, other)
        if not same:
            yield f"{METRICS} has {row}, and without the fault {other}"
            return


def _close(row: Row, other: Row) -> bool:
    """Return True for equal numbers to rounding in float64."""
    pairs = zip(row, other, strict=True)
    return all(
        a == b or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-9)) for a, b in pairs
    )


def replayed(run: Path, ranks: int) -> Iterator[str]:
    """Yield what differs between the newest checkpoint and the replay of the servers' logs."""
    source = checkpoint.CheckpointSource(checkpoint.find(run))
    options = RunConfig.from_dict(source.manifest.meta["config"])
    known: Any = source.manifest.meta["tokenizer"]
    data = options.objective.load(options.corpus, options.shape, known, SelfCommunicator())
    config = resolve(options, ranks, data.vocab_size)
    optimization = options.optimization
    task = data.task(config.model, batch=optimization.batch, seed=optimization.seed)
    lone = LoneWorker(config, task, INIT_STD)
    lone.buffers.values[...] = replay(config, task, read_logs(run))
    for parameter in lone.buffers.parameters:
        name, shape = f"model/{parameter.name}", parameter.spec.shape
        saved = source.read(name, tuple(slice(0, size) for size in shape))
        if not np.array_equal(parameter.get(), saved):
            yield f"{name} differs from the replay of the log"
            return


def left(place: Place, alone: bool) -> Iterator[str]:
    """Yield what an ended run has left behind, and should not have.

    `alone`: /dev/shm is this campaign's. MPI libraries leave files there when they are killed.
    `minillm doctor` must find all of them. They are removed.
    """
    for process in gone(place.mark, 10):
        yield f"process {process} is left"
    run = place.run
    for path in sorted(run.rglob("*")) if run.exists() else []:
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in PARTS):
            yield f"{path.relative_to(run)} is left"
    temporary = place.folder / "tmp"
    known, usual = set(), leftovers.SECONDS
    leftovers.SECONDS = -1.0
    try:
        shared = None if alone else temporary  # a folder without segments
        known = set(leftovers.find(shared, temporary))
    finally:
        leftovers.SECONDS = usual
    files = [*temporary.rglob("*"), *(leftovers.SHARED_MEMORY.glob("*") if alone else [])]
    for path in files:
        if path.is_dir():
            continue
        if not known.intersection((path, *path.parents)):
            yield f"{path} is left, and doctor does not know it"
        path.unlink(missing_ok=True)
