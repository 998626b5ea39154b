"""Odd machines: full disks, slow ones, jumping clocks, small shared memory, few file handles.

`PYTHONPATH=tests python -m campaigns environments`. A run ends with an error of one line and goes
on when the machine is repaired, or it takes no notice. In both cases its losses are those of an
undisturbed run, to the bit, but for 64 ranks, where they agree to rounding.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from campaigns import disturbed
from campaigns.disturbed import STEPS, TRAIN, Method, Place, Row
from campaigns.kills import RUN, flags, whole
from minillm.base.errors import ConfigError
from minillm.base.record import Record
from minillm.comm.leftovers import SHARED_MEMORY

ODD = str(Path(__file__).with_name("odd_machine.py"))
BOTH = Method("shared", 2, ("--node-shared", "on"))
APART = Method("dp", 2, ("--node-shared", "off"))
ERROR = re.compile(r"^(?:rank \d+: )?error: ", re.M)
MANY = 64  # ranks
RANKS = f"{MANY} ranks"
TOLERANCE = 1e-6  # relative, of float32 losses of another order of sums


@dataclass(frozen=True, kw_only=True)
class Options(Record):
    """Train on odd machines: an error of one line, or a run that takes no notice."""

    only: str | None = None
    """Names of scenarios, with commas between; left out: all but the largest."""
    ranks: bool = False
    """Run 64 ranks as well, which needs some 5 GB of memory."""


# MPI_Init of MPICH ends the ranks before minillm has begun.
MPI_ENDS = "Fatal error in internal_Init|terminated with the exit string"


class Scenario(NamedTuple):
    """Odd machine."""

    method: Method
    oddity: str  # of odd_machine.py
    ends: bool | None  # with an error; None: it may
    words: str = ""  # of the error
    flags: tuple[str, ...] = ()


ODDITIES: dict[str, Scenario] = {
    "file size": Scenario(APART, "full:4000", True, "free some space"),
    "quota": Scenario(APART, "refuses:EDQUOT", True, "could not be written|cannot be written"),
    "disk error": Scenario(APART, "refuses:EIO", True, "could not be written|cannot be written"),
    "read-only": Scenario(APART, "read-only", True, "Read-only"),
    "folder vanishes": Scenario(APART, "vanishes", None, "No such file"),
    "slow disk": Scenario(BOTH, "slow:0.1", False, flags=("--comm-timeout", "0.5")),
    "clock jumps": Scenario(BOTH, "clock:1", False, flags=("--save-every", "5")),
    "2 more file handles": Scenario(APART, "files:2", None, "Too many open files"),
    "no more file handles": Scenario(APART, "files:0", None, "Too many open files"),
    "24 file handles": Scenario(BOTH, "all-files:24", None, MPI_ENDS),
}


def run(options: Options) -> int:
    """Run all scenarios and return the number of those with a fault."""
    began, faulty = time.monotonic(), 0
    with disturbed.workplace("environments") as (top, note):
        found = scenarios(not note)
        names = chosen(options, list(found))
        wholes = {m.name: whole(m, Place(top / m.name)) for m in (BOTH, APART)}
        for number, name in enumerate(names):
            place, (method, scenario) = Place(top / str(number)), found[name]
            place.environment()
            faults = list(scenario(place, wholes[method.name]))
            faults += disturbed.left(place, not note)
            faulty += bool(faults)
            print(f"{'FAULT' if faults else 'ok   '} {name}: {outcome(place)}", flush=True)
            for text in faults:
                print(f"      {text}")
    if note:
        print(f"note: {note}; without root no file system was mounted")
    print(
        f"environments: {len(names)} scenarios, {faulty} with faults, "
        f"{time.monotonic() - began:.0f} s"
    )
    return faulty


Test = Callable[[Place, Sequence[Row]], Iterator[str]]
"""Run a scenario in a place, and yield what is wrong. It gets the metrics of an undisturbed run."""


def scenarios(mounts: bool) -> dict[str, tuple[Method, Test]]:
    """Return all scenarios with the method of their undisturbed run, by name.

    Those of file systems only if this process `mounts` them.
    """
    found: dict[str, tuple[Method, Test]] = {
        name: (scenario.method, partial(odd, scenario)) for name, scenario in ODDITIES.items()
    }
    found["two runs in a folder"] = APART, two
    if mounts:
        found |= {"full disk": (APART, full), "read-only from the start": (APART, never_writable)}
        for size in ("1m", "6m", "16m"):
            found[f"{size} of shared memory"] = BOTH, partial(small, size)
    found[RANKS] = APART, many
    return found


def chosen(options: Options, names: Sequence[str]) -> list[str]:
    """Return the scenarios that are asked for. Raises ConfigError."""
    if options.only is None:
        return [name for name in names if name != RANKS or options.ranks]
    asked = options.only.split(",")
    if unknown := [name for name in asked if name not in names]:
        raise ConfigError(f"--only {', '.join(unknown)}: choose from {', '.join(names)}")
    return asked


def outcome(place: Place) -> str:
    """Return the first error that the programs of a place have printed."""
    lines = [line for line in disturbed.output(place).splitlines() if ERROR.match(line)]
    return lines[0] if lines else "no error"


def refused(status: int | None, text: str, words: str) -> Iterator[str]:
    """Yield what is wrong with an end that should be an error of one line with `words`."""
    if status is None or status <= 0:
        yield f"it ended with status {status}"
    lines = len(ERROR.findall(text))
    wanted = 0 if words == MPI_ENDS else 1
    if lines != wanted or "Traceback" in text or not re.search(words, text, re.I):
        yield f"not an error of one line with {words!r}: {text[-700:]}"


def goes_on(method: Method, place: Place, expected: Sequence[Row]) -> Iterator[str]:
    """Yield how the run fails to go on, on a machine that is repaired, to the same losses."""
    resumes = disturbed.newest(place.run) > 0
    words = ["--resume", str(place.run)] if resumes else flags(method, place)
    status = disturbed.wait(disturbed.start(method, place, [*TRAIN, *words]), place, RUN)
    if status != 0:
        yield f"it does not go on (status {status}): {disturbed.output(place)[-700:]}"
    yield from same(method, place, expected)


def same(method: Method, place: Place, expected: Sequence[Row]) -> Iterator[str]:
    """Yield what differs from the undisturbed run."""
    found = disturbed.curve(place.run)
    yield from disturbed.differences(found, expected, method)
    if len(found) != STEPS or not disturbed.complete(place.run):
        yield f"{len(found)} lines of metrics, and checkpoints up to {disturbed.newest(place.run)}"


def odd(scenario: Scenario, place: Place, expected: Sequence[Row]) -> Iterator[str]:
    """Run a scenario, go on if it has ended, and yield what breaks a promise."""
    method = scenario.method
    words = [ODD, scenario.oddity, "minillm.train", *flags(method, place), *scenario.flags]
    status = disturbed.wait(disturbed.start(method, place, words), place, RUN)
    text = disturbed.output(place)
    if status == 0:
        if scenario.ends:
            yield "it took no notice"
        if scenario.oddity != "vanishes":
            yield from same(method, place, expected)
        return
    if scenario.ends is False:
        yield f"it ended with status {status}: {text[-700:]}"
        return
    yield from refused(status, text, scenario.words)
    for path in place.run.rglob("*") if place.run.exists() else []:
        # A folder that could not be removed is removed by the next save.
        if path.suffix == ".tmp":
            yield f"{path.relative_to(place.run)} is half written"
    kept = scenario.oddity.split(":")[0] in ("full", "refuses", "read-only")
    if kept and disturbed.newest(place.run) < 10:
        yield f"the checkpoint of step 10 is lost: {disturbed.newest(place.run)}"
    yield from goes_on(method, place, expected)


def mount(folder: Path, *words: str) -> None:
    """Mount a file system in this process's namespace."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *words, str(folder)], check=True)


def unmount(folder: Path) -> None:
    """Take a file system away again."""
    subprocess.run(["umount", "-l", str(folder)], check=True)


def full(place: Place, expected: Sequence[Row]) -> Iterator[str]:
    """Fill the disk of a run, free it, and go on."""
    mount(place.run, "-t", "tmpfs", "-o", "size=8m", "tmpfs")
    try:
        inner = Place(place.run / "inner")
        inner.environment()
        asked = [*flags(APART, inner), "--data", str(place.folder.parent / "text.txt")]
        words = [ODD, "filled:20000", "minillm.train", *asked]
        status = disturbed.wait(disturbed.start(APART, inner, words), inner, RUN)
        shutil.copy(inner.folder / "output.txt", place.folder)
        yield from refused(status, disturbed.output(inner), "No space left")
        (inner.folder / "ballast").unlink(missing_ok=True)
        if disturbed.newest(inner.run) != 10:
            yield f"the newest checkpoint is of step {disturbed.newest(inner.run)}, not 10"
        yield from goes_on(APART, inner, expected)
        yield from disturbed.left(inner, True)
    finally:
        unmount(place.run)


def never_writable(place: Place, _: Sequence[Row]) -> Iterator[str]:
    """Start a run in a folder that is mounted read-only."""
    mount(place.folder / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs")
    try:
        asked = [*flags(APART, place), "--out", str(place.folder / "disk" / "run")]
        status = disturbed.wait(disturbed.start(APART, place, [*TRAIN, *asked]), place, RUN)
        yield from refused(status, disturbed.output(place), "Read-only")
    finally:
        unmount(place.folder / "disk")


LARGE = ("--dim=256", "--layers=4", "--stop-after=2")  # 38 MB of shared memory


def small(size: str, place: Place, expected: Sequence[Row]) -> Iterator[str]:
    """Train with little shared memory: an error that names it, or a run that takes no notice."""
    mount(SHARED_MEMORY, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        asked = [*flags(BOTH, place), *(LARGE if size == "16m" else ())]
        status = disturbed.wait(disturbed.start(BOTH, place, [*TRAIN, *asked]), place, RUN)
        text = disturbed.output(place)
        if status != 0 and size != "6m":  # MPICH dies at its start, by signal 7 or 11
            yield from refused(status, text, MPI_ENDS)
            if f"note: {SHARED_MEMORY} has" not in text:
                yield f"nothing says that there is too little of {SHARED_MEMORY}: {text}"
        elif status != 0:
            yield from refused(status, text, "/dev/shm has 4 MB free")
        elif size != "16m":
            yield from same(BOTH, place, expected)
    finally:
        unmount(SHARED_MEMORY)


def two(place: Place, expected: Sequence[Row]) -> Iterator[str]:
    """Start a second run in the folder of one, kill the first, and go on."""
    slowed = [ODD, "slow:0.3", "minillm.train", *flags(APART, place)]
    first = disturbed.start(APART, place, slowed)
    deadline = time.monotonic() + 60
    while len(disturbed.curve(place.run)) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    other = Place(place.folder / "other")
    other.environment()
    for process in disturbed.living(place.mark):
        disturbed.send(process, signal.SIGSTOP)  # so that it does not end meanwhile
    new = [*flags(APART, place), "--data", str(place.folder.parent / "text.txt")]
    for words in (new, ["--resume", str(place.run)]):
        status = disturbed.wait(disturbed.start(APART, other, [*TRAIN, *words]), other, RUN)
        yield from refused(status, disturbed.output(other), "in use by another run|earlier run")
        (other.folder / "output.txt").unlink()
    for process in disturbed.living(place.mark):
        disturbed.send(process, signal.SIGKILL)
    disturbed.wait(first, place, 60)
    disturbed.gone(place.mark, 30)
    if not disturbed.released(place.run):
        yield "a lock outlives its run"
    yield from goes_on(APART, place, expected)


def many(place: Place, _: Sequence[Row]) -> Iterator[str]:
    """Train on far more ranks than cores, and compare with the losses of one."""
    method = Method("many", MANY, ("--node-shared", "off", "--batch", str(MANY), "--dtype=float64"))
    alone = Method("one", 1, method.words)
    curves = []
    for each in (alone, method):
        inner = Place(place.folder / each.name)
        inner.environment()
        asked = [*flags(each, inner), "--data", str(place.folder.parent / "text.txt")]
        asked += ["--stop-after", "3", "--comm-timeout", "120"]
        status = disturbed.wait(disturbed.start(each, inner, [*TRAIN, *asked]), inner, 400)
        shutil.copy(inner.folder / "output.txt", place.folder)
        if status != 0:
            yield f"{each.ranks} ranks end with status {status}: {disturbed.output(inner)[-700:]}"
            return
        curves.append([row.loss for row in disturbed.curve(inner.run)])
        yield from disturbed.left(inner, False)
    if len(curves[1]) != 3 or not all(
        math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(*curves, strict=True)
    ):
        yield f"losses of {MANY} ranks and of one: {json.dumps(curves)}"
