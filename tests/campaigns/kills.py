"""Random kills, stops and signals of ranks: nothing is lost but the step in flight.

`PYTHONPATH=tests python -m campaigns kills --runs 200 --seed 1`. Each run has one or two faults of
a random rank at a random moment, alone or under `minillm supervise`. It goes on until it is
complete. Its losses equal those of an undisturbed run. For asynchronous servers its weights equal
the replay of their log. Under ULFM a run outlives the loss of ranks within one start.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpi_helpers

from campaigns import disturbed
from campaigns.disturbed import FLAGS, SAVES, STEPS, TRAIN, VICTIM, Method, Place, Row
from campaigns.plans import ACTS, METHODS, Plan, plan
from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.training.going_on import LOG

TIMEOUT = 10.0  # s, --comm-timeout
END = 30.0  # s after a fault until all processes have ended, beside the time-out: a busy machine
RUN = 240.0  # s of one start
OUTSIDE = ("start", "loading", "end")  # moments before the first step or behind the last one
TOO_FEW = "too few for a replica"


@dataclass(frozen=True, kw_only=True)
class Options(Record):
    """Kill, stop and signal random ranks at random moments, and compare with undisturbed runs."""

    runs: int = option(20, at_least=1)
    """Number of disturbed runs."""
    seed: int = 1
    """Seed of methods, ranks, moments and acts."""
    methods: str = "all"
    """Methods by name, with commas between; all: those that the MPI here has; ulfm: those of them
    that outlive a loss."""
    minutes: float | None = option(None, above=0)
    """Time after which no further run begins; left out: no limit."""
    first: int = option(0, at_least=0)
    """Number of the first run."""
    only: int | None = option(None, at_least=0)
    """Number of the one run to repeat."""
    keep: str | None = None
    """Folder that keeps faulty runs."""


def available(asked: str) -> tuple[list[Method], str]:
    """Return the methods that are asked for and can run here, and the MPI. Raises ConfigError."""
    if mpi_helpers.MPIRUN is None:
        raise ConfigError("there is no mpirun; install one with: pip install -e '.[mpich]'")
    mpi = mpi_helpers.family()
    found = {m.name: m for m in METHODS if not m.mpi or m.mpi == mpi}
    groups = {"all": list(found), "ulfm": [name for name, m in found.items() if m.outlives]}
    names = groups.get(asked, asked.split(","))
    if missing := set(names) - set(found):
        raise ConfigError(f"--methods: {', '.join(sorted(missing))} cannot run with {mpi}")
    return [method for name, method in found.items() if name in names], str(mpi)


def run(options: Options) -> int:
    """Run the campaign and return the number of faulty runs."""
    began, (methods, mpi) = time.monotonic(), available(options.methods)
    counts: Counter[str] = Counter()
    with disturbed.workplace("kills") as (top, note):
        wholes = dict[str, list[Row]]()
        numbers = range(options.first, options.runs) if options.only is None else [options.only]
        for number in numbers:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                break
            asked = plan(methods, options.seed, number, mpi == "MPICH")
            place = Place(top / str(number))
            if asked.method.name not in wholes:
                wholes[asked.method.name] = whole(asked.method, Place(top / asked.method.name))
            start = time.monotonic()
            found = list(disturb(asked, place, wholes[asked.method.name], counts))
            found += disturbed.left(place, not note)
            counts["runs"] += 1
            told = f"{number} ({time.monotonic() - start:.0f} s): {asked.describe()}"
            print(f"{'FAULT' if found else 'ok   '} {told}", flush=True)
            for text in found[:4]:
                print(f"      {text}", flush=True)
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
        f"kills: {counts['runs']} runs of seed {options.seed} with {mpi} ({len(wholes)} methods, "
        f"{counts['supervised']} supervised): {counts['done']} faults acted ({acts}), "
        f"{counts['starts']} starts, {counts['outlived']} losses outlived, {counts['faulty']} "
        f"faulty runs, {time.monotonic() - began:.0f} s"
    )
    return counts["faulty"]


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
    acted = faults.with_name(f"{faults.name}.done")
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
        known = len(_lines(acted))
        process = disturbed.start(method, place, [*victim, *words], before)
        status = disturbed.wait(process, place, RUN)
        done = _lines(acted)[known:]
        counts["done"] += len(done)
        for each in done:
            counts[each["act"]] += 1
        if status is None:
            yield f"it did not end within {RUN:.0f} s: {disturbed.output(place)[-600:]}"
            return
        yield from _ended(asked, status, done, place)
        yield from _outlived(asked, done, place)
        if left := disturbed.gone(place.mark, 10):
            yield f"{len(left)} processes outlived their run by 10 s"
        if not disturbed.released(place.run):
            yield "a lock outlives its run"
        found = disturbed.curve(place.run)
        if any(fault["act"] == "term" for fault in done):
            expected = _broken_off(expected, found)
        yield from disturbed.differences(found, expected, method)
        if disturbed.complete(place.run) and status == 0:
            break
        if not done and status != 0:
            return  # `_ended` has said so
    counts["outlived"] += len(_lines(place.run / LOG))
    if not disturbed.complete(place.run) or len(disturbed.curve(place.run)) != STEPS:
        yield f"it ended at step {disturbed.newest(place.run)} of {STEPS}"
    elif method.promise == "log":
        yield from disturbed.replayed(place.run, method.ranks)


def _broken_off(expected: list[Row], found: list[Row]) -> list[Row]:
    """Return the expected rows of a run whose last evaluation SIGTERM may have broken off."""
    pairs = enumerate(zip(found, expected, strict=False))
    last = max((i for i, (_, row) in pairs if row.held_out is not None), default=None)
    if last is None or found[last].held_out is not None:
        return expected
    return [*expected[:last], expected[last]._replace(held_out=None), *expected[last + 1 :]]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON, none without a file."""
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
    through = asked.method.outlives and disturbed.complete(place.run)
    if not asked.supervised and act in ("kill", "stop", "mpirun", "proxy") and not through:
        if now - last["time"] > limit:
            yield f"it ended {now - last['time']:.0f} s after {act}"
        # Open MPI's mpirun returns 0 under ULFM if all ranks of the start are killed.
        none = asked.method.outlives and not _left(asked, done)
        if status == 0 and moment != "end" and not none:
            yield f"status 0 after {act}"
    if act == "pause" and status != 0:
        yield f"status {status} after a pause: {disturbed.output(place)[-600:]}"
    if act == "term" and moment not in ("start", "loading") and status != 0:
        yield f"status {status} after SIGTERM: {disturbed.output(place)[-600:]}"
    # A supervisor starts nothing again that ends before its first step.
    early = moment == "step" and last["times"] == 0 and len(done) == 1
    if asked.supervised and status != 0 and moment not in ("start", "loading") and not early:
        yield f"the supervisor ended with status {status}: {disturbed.output(place)[-600:]}"
    if moment == "step" and not asked.supervised and len(done) == 1:
        # The first rank may not have written the step before.
        first = last["times"]
        if steps < min(first - 1, STEPS):
            yield f"{steps} lines of metrics after a fault in step {first + 1}"
        saved = (first - 1) // SAVES * SAVES
        if disturbed.newest(place.run) < saved:
            yield f"the checkpoint of step {saved} is lost"


def _outlived(asked: Plan, done: Sequence[dict[str, Any]], place: Place) -> Iterator[str]:
    """Yield what is wrong with a start that should go on without the ranks that it loses."""
    method, words = asked.method, disturbed.output(place)
    if must_outlive(asked, done) and not disturbed.complete(place.run):
        yield f"it did not outlive the loss: {words[-600:]}"
    if asked.too_few and len(done) == 2 and TOO_FEW not in words:
        yield f"nothing says that too few ranks are left: {words[-600:]}"
    for line in _lines(place.run / LOG):
        times = [fault["time"] for fault in done if fault["time"] <= line["time"]]
        stops = any(fault["act"] == "stop" for fault in done)
        if times and line["time"] - max(times) > END and not stops:
            yield f"the recovery took {line['time'] - max(times):.0f} s"
        if method.promise == "bits" and line["dp"] != method.ranks // method.replica:
            yield f"it went on with dp {line['dp']}: {words[-600:]}"


def must_outlive(asked: Plan, done: Sequence[dict[str, Any]]) -> bool:
    """Return True if a start with these faults must come to the end of the run.

    A new rank that is killed does not count: the ranks of the start go on without it.
    """
    method = asked.method
    if not method.outlives or asked.too_few or not done:
        return False
    if any(f["act"] not in ("kill", "pause") or f["moment"] in OUTSIDE for f in done):
        return False
    if method.promise == "bits":
        return _left(asked, done) > 0
    left = method.ranks
    for _ in range(method.ranks - _left(asked, done)):  # ranks without a replica leave each time
        left = (left - 1) // method.replica * method.replica
    return left > 0


def _left(asked: Plan, done: Sequence[dict[str, Any]]) -> int:
    """Return the ranks of a start that `done` kills have not hit."""
    hit = {f["rank"] for f in done if isinstance(f["rank"], int) and f["act"] == "kill"}
    return asked.method.ranks - len(hit)
