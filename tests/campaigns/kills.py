"""Random kills, stops and signals of ranks: nothing is lost but the step in flight.

`PYTHONPATH=tests python -m campaigns kills --runs 200 --seed 1`. Each run has one or two faults of
a random rank at a random moment, alone or under `minillm supervise`. It goes on until it is
complete. Its losses equal those of an undisturbed run. For asynchronous servers its weights equal
the replay of their log.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mpi_helpers

from campaigns import disturbed
from campaigns.disturbed import FLAGS, SAVES, STEPS, TRAIN, VICTIM, Method, Place, Row
from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.comm.launchers import mpi_family

TIMEOUT = 10.0  # s, --comm-timeout
END = 30.0  # s after a fault until all processes have ended, beside the time-out: a busy machine
RUN = 240.0  # s of one start
START = 2.0  # s in which a fault of the start falls


def _method(name: str, ranks: int, words: str, promise: str = "bits", **more: Any) -> Method:
    return Method(name, ranks, tuple(words.split()), promise, **more)


SERVER = "--servers 1 --server"
SHRINK = "--dtype float64 --node-shared off --on-failure shrink"
ULFM: dict[str, Any] = dict(mpi="Open MPI", mpirun=("--with-ft", "ulfm"))
METHODS = [
    _method("alone", 0, ""),
    _method("dp", 2, "--node-shared off"),
    _method("shared", 2, "--node-shared on"),
    _method("tp", 2, "--tp 2"),
    _method("pp", 2, "--pp 2"),
    _method("zero1", 2, "--zero 1"),
    _method("zero2", 2, "--zero 2"),
    _method("zero3", 2, "--zero 3"),
    _method("sync", 3, f"{SERVER} sync"),
    _method("async", 3, f"{SERVER} async", "log"),
    _method("stale", 3, f"{SERVER} stale --staleness 2", "log"),
    _method("local", 2, "--local-steps 5"),
    _method("powersgd", 2, "--compress powersgd"),
    _method("lstm", 2, "--model lstm --layers 1"),
    _method("tp-pp", 4, "--tp 2 --pp 2"),
    _method("shrink", 3, f"{SHRINK} --batch 12", "rounding", **ULFM),
    _method("shrink-tp", 4, f"{SHRINK} --tp 2", "rounding", **ULFM),
]
MOMENTS = ("start", "step", "step", "save", "evaluation", "end")
ACTS = ("kill", "kill", "kill", "stop", "pause", "term", "mpirun", "proxy")


@dataclass(frozen=True, kw_only=True)
class Options(Record):
    """Kill, stop and signal random ranks at random moments, and compare with undisturbed runs."""

    runs: int = option(20, at_least=1)
    """Number of disturbed runs."""
    seed: int = 1
    """Seed of methods, ranks, moments and acts."""
    methods: str = "all"
    """Methods by name, with commas between; all: those that the MPI of this environment has."""
    minutes: float | None = option(None, above=0)
    """Time after which no further run begins; left out: no limit."""
    only: int | None = option(None, at_least=0)
    """Number of the one run to repeat."""
    keep: str | None = None
    """Folder that keeps faulty runs."""


class Plan(NamedTuple):
    """Disturbed run."""

    method: Method
    supervised: bool
    faults: list[dict[str, Any]]  # one for each start

    def describe(self) -> str:
        """Return the plan in a line."""
        parts = [
            f"{f['act']} rank {f['rank']} at {f['moment']} {f['times']} + {f['seconds']:.3f} s"
            for f in self.faults
        ]
        return f"{self.method.name}{' supervised' * self.supervised}: {', then '.join(parts)}"


def available(asked: str) -> list[Method]:
    """Return the methods that are asked for and can run here. Raises ConfigError."""
    if mpi_helpers.MPIRUN is None:
        raise ConfigError("there is no mpirun; install one with: pip install -e '.[mpich]'")
    told = subprocess.run([mpi_helpers.MPIRUN, "--version"], capture_output=True, text=True)
    mpi, names = mpi_family(told.stdout), asked.split(",")
    found = [m for m in METHODS if not m.mpi or m.mpi == mpi]
    if asked == "all":
        return found
    missing = set(names) - {method.name for method in found}
    if missing:
        raise ConfigError(f"--methods: {', '.join(sorted(missing))} cannot run with {mpi}")
    return [method for method in found if method.name in names]


def plan(methods: Sequence[Method], seed: int, number: int, mpich: bool) -> Plan:
    """Return the disturbed run of a number."""
    rng, method = random.Random(f"{seed}/{number}"), methods[number % len(methods)]
    supervised = number // len(methods) % 2 == 1 and method.promise != "rounding"
    faults = [_fault(method, rng, MOMENTS, mpich)]
    if method.promise == "rounding":
        faults = [_fault(method, rng, ("step", "save", "evaluation"), mpich) | {"act": "kill"}]
    elif rng.random() < 0.4:
        moments = ("start", "loading", "step", "save")
        faults.append(_fault(method, rng, moments, mpich) | {"times": 0})
    return Plan(method, supervised, faults)


def _fault(
    method: Method, rng: random.Random, moments: Sequence[str], mpich: bool
) -> dict[str, Any]:
    moment, act = rng.choice(moments), rng.choice(ACTS)
    rank = rng.randrange(max(1, method.ranks))
    if "--servers" in method.words and rank == method.ranks - 1 and moment != "start":
        moment = "served"
    if act in ("mpirun", "proxy") and not (mpich and method.ranks):
        act = "kill"
    if act == "stop" and (moment == "start" or not method.ranks):
        act = "pause"  # nobody waits for a process alone, and MPI_Init waits for 5 minutes
    most = {"start": START, "step": 0.005, "served": 0.003, "save": 0.02, "evaluation": 0.01}
    times = {"step": rng.randrange(1, STEPS), "served": rng.randrange(STEPS)}
    times |= {"save": rng.randrange(STEPS // SAVES), "evaluation": rng.randrange(3)}
    seconds = rng.choice([0.0, 1.0]) * rng.uniform(0, most.get(moment, 0.05))
    if moment == "start":
        seconds = rng.uniform(0, START)
    return dict(moment=moment, act=act, rank=rank, times=times.get(moment, 0), seconds=seconds)


def run(options: Options) -> int:
    """Run the campaign and return the number of faulty runs."""
    began, methods = time.monotonic(), available(options.methods)
    mpich = not any(method.mpi for method in METHODS if method in methods) and _is_mpich()
    note = disturbed.private_memory()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="minillm-kills-") as name:
        top, wholes = Path(name), dict[str, list[Row]]()
        disturbed.write_text(top)
        numbers = range(options.runs) if options.only is None else [options.only]
        for number in numbers:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                break
            asked = plan(methods, options.seed, number, mpich)
            place = Place(top / str(number))
            if asked.method.name not in wholes:
                wholes[asked.method.name] = whole(asked.method, Place(top / asked.method.name))
            found = list(disturb(asked, place, wholes[asked.method.name], counts))
            found += disturbed.left(place, not note)
            counts["runs"] += 1
            for text in found[:4]:
                print(f"fault {number}: {text}\n    {asked.describe()}", flush=True)
            if found:
                counts["faulty"] += 1
                if options.keep is not None:
                    shutil.copytree(place.folder, Path(options.keep) / str(number))
                elif options.only is not None:
                    print(disturbed.output(place))
            shutil.rmtree(place.folder)
    acts = ", ".join(f"{name} {counts[name]}" for name in sorted(set(ACTS)) if counts[name])
    if note:
        print(f"note: {note}")
    print(
        f"kills: {counts['runs']} runs of seed {options.seed} ({len(wholes)} methods, "
        f"{counts['supervised']} supervised): {counts['done']} faults acted ({acts}), "
        f"{counts['starts']} starts, {counts['faulty']} faulty runs, "
        f"{time.monotonic() - began:.0f} s"
    )
    return counts["faulty"]


def _is_mpich() -> bool:
    told = subprocess.run([str(mpi_helpers.MPIRUN), "--version"], capture_output=True, text=True)
    return mpi_family(told.stdout) == "MPICH"


def flags(method: Method, place: Place) -> list[str]:
    """Return the flags of a new run."""
    text = str(place.folder.parent / "text.txt")
    common = [*FLAGS, "--data", text, "--comm-timeout", str(TIMEOUT), "--out", str(place.run)]
    return [*common, *method.words]


def whole(method: Method, place: Place) -> list[Row]:
    """Return the metrics of an undisturbed run. Raises RuntimeError if it fails."""
    status = disturbed.wait(
        disturbed.start(method, place, [*TRAIN, *flags(method, place)]), place, RUN
    )
    found = disturbed.curve(place.run)
    if status != 0 or not disturbed.complete(place.run) or len(found) != STEPS:
        raise RuntimeError(f"{method.name} fails undisturbed: {disturbed.output(place)}")
    shutil.rmtree(place.folder)
    return found


def disturb(asked: Plan, place: Place, expected: list[Row], counts: Counter[str]) -> Iterator[str]:
    """Run a plan until the run is complete, and yield what breaks a promise."""
    method, faults = asked.method, place.folder / "faults.json"
    place.environment()
    faults.write_text(json.dumps(asked.faults))
    victim = [VICTIM, str(faults), "minillm.train"]
    before: list[str] = []
    if asked.supervised:
        counts["supervised"] += 1
        before = [sys.executable, "-m", "minillm", "supervise", "--wait", "1s", "--hang", "40s"]
        before += ["--"]
    for _ in range(len(asked.faults) + 2):
        counts["starts"] += 1
        resumes = disturbed.newest(place.run) > 0
        words = ["--resume", str(place.run)] if resumes else flags(method, place)
        known = len(_done(faults))
        process = disturbed.start(method, place, [*victim, *words], before)
        status = disturbed.wait(process, place, RUN)
        done = _done(faults)[known:]
        counts["done"] += len(done)
        for each in done:
            counts[each["act"]] += 1
        if status is None:
            yield f"it did not end within {RUN:.0f} s: {disturbed.output(place)[-600:]}"
            return
        yield from _ended(asked, status, done, place)
        if left := disturbed.gone(place.mark, 10):
            yield f"{len(left)} processes outlived their run by 10 s"
        if not disturbed.released(place.run):
            yield "a lock outlives its run"
        yield from disturbed.differences(disturbed.curve(place.run), expected, method)
        if disturbed.complete(place.run) and status == 0:
            break
        if not done and status != 0:
            return  # `_ended` has said so
    if not disturbed.complete(place.run) or len(disturbed.curve(place.run)) != STEPS:
        yield f"it ended at step {disturbed.newest(place.run)} of {STEPS}"
    elif method.promise == "log":
        yield from disturbed.replayed(place.run, method.ranks)


def _done(faults: Path) -> list[dict[str, Any]]:
    """Return the faults that have acted."""
    path = Path(f"{faults}.done")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _ended(asked: Plan, status: int, done: Sequence[dict[str, Any]], place: Place) -> Iterator[str]:
    """Yield what is wrong with the end of a start, in which `done` faults have acted."""
    if not done:
        if status != 0:
            words = disturbed.output(place)[-600:]
            yield f"a start without a fault ended with status {status}: {words}"
        return
    last, now = done[-1], time.time()
    act, moment = last["act"], last["moment"]
    steps = len(disturbed.curve(place.run))
    limit = END + TIMEOUT * (act == "stop")
    if not asked.supervised and act in ("kill", "stop", "mpirun", "proxy"):
        if now - last["time"] > limit:
            yield f"it ended {now - last['time']:.0f} s after {act}"
        if status == 0 and asked.method.promise != "rounding" and moment != "end":
            yield f"status 0 after {act}"
    if act == "pause" and status != 0:
        yield f"status {status} after a pause: {disturbed.output(place)[-600:]}"
    if act == "term" and moment not in ("start", "loading") and status != 0:
        yield f"status {status} after SIGTERM: {disturbed.output(place)[-600:]}"
    if asked.supervised and status != 0 and moment not in ("start", "loading"):
        yield f"the supervisor ended with status {status}: {disturbed.output(place)[-600:]}"
    if moment == "step" and not asked.supervised and len(done) == 1:
        # The first rank may not have written the step before.
        first = last["times"]
        if steps < min(first - 1, STEPS):
            yield f"{steps} lines of metrics after a fault in step {first + 1}"
        saved = (first - 1) // SAVES * SAVES
        if disturbed.newest(place.run) < saved:
            yield f"the checkpoint of step {saved} is lost"
