"""Damaged input for every program: an error of one line, or a correct run.

`PYTHONPATH=tests python -m campaigns mutations --cases 2000 --seed 1`. A case is a valid input with
an edit, or a valid command line with an edit. It depends on seed and number alone: `--only N`
repeats one, and `--keep FOLDER` keeps its files.
"""

from __future__ import annotations

import random
import re
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from campaigns import edits, inputs, sandbox
from minillm.base.record import Record, option

MOST_BYTES = 1 << 30  # of memory: twice what the commands grant to a run
ERROR = re.compile(r"^(?:minillm|[\w.]+)?(?:: )?error: |^minillm: ")


@dataclass(frozen=True, kw_only=True)
class Options(Record):
    """Damage inputs and command lines, and see an error of one line or a correct run."""

    cases: int = option(200, at_least=1)
    """Number of cases."""
    seed: int = 1
    """Seed of all edits."""
    first: int = option(0, at_least=0)
    """Number of the first case."""
    minutes: float | None = option(None, above=0)
    """Time after which no further case begins; left out: no limit."""
    only: int | None = option(None, at_least=0)
    """Number of the one case to repeat."""
    keep: str | None = None
    """Folder that keeps the files of faulty cases."""


class Case(NamedTuple):
    """Case: a command in a folder of its own."""

    subject: str
    folder: Path
    words: list[str]
    writable: list[Path]


def run(options: Options) -> int:
    """Run the campaign and return the number of faults."""
    began, faults, peak = time.monotonic(), 0, 0
    counts: Counter[str] = Counter()
    kept = None if options.keep is None else Path(options.keep)
    with tempfile.TemporaryDirectory(prefix="minillm-mutations-") as top:
        base = Path(top, "inputs")
        inputs.preload()
        inputs.write(base)
        last = options.first + options.cases
        numbers = range(options.first, last) if options.only is None else [options.only]
        for number in numbers:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                break
            counts["cases"] += 1
            folder = Path(top, "case")
            case = make(base, folder, options.seed, number)
            module = inputs.module_of(case.words[0])
            ended = sandbox.call(module, case.words[1:], folder, case.writable)
            found = list(faults_of(ended, case))
            counts[case.subject] += 1
            counts["ran" if ended.status == 0 else "refused"] += not found
            counts["stopped"] += ended.stopped
            peak = max(peak, ended.peak)
            for text in found[:3]:
                print(f"fault {number}: {text}\n    {shlex.join(case.words)[:600]}", flush=True)
            faults += bool(found)
            if found and kept is not None:
                shutil.copytree(folder, kept / str(number), dirs_exist_ok=True, symlinks=True)
            if options.only is not None:
                print(f"status {ended.status}\n{ended.out}{ended.err}")
            shutil.rmtree(folder)
    subjects = ", ".join(
        f"{name} {count}"
        for name, count in sorted(counts.items())
        if name not in ("cases", "ran", "refused", "stopped")
    )
    print(
        f"mutations: {counts['cases']} cases of seed {options.seed} ({subjects}): "
        f"{counts['refused']} refused in a line, {counts['ran']} ran (of both, "
        f"{counts['stopped']} asked to stop), {faults} faults; at most {peak / 1e6:.0f} MB, "
        f"{time.monotonic() - began:.0f} s"
    )
    return faults


def make(base: Path, folder: Path, seed: int, number: int) -> Case:
    """Make the folder of a case, and return the case."""
    rng = random.Random(f"{seed}/{number}")
    source = folder / "in"
    (folder / "out").mkdir(parents=True)
    if number % 3 == 2:
        subject, plain = rng.choice(inputs.COMMANDS)
        shutil.copytree(base, source)
        words = [plain[0], *edits.command(plain[1:], rng)]
        words = [word.replace("IN/", f"{source}/") for word in words]
        return Case(subject, folder, words, [folder])
    kind = inputs.KINDS[number % len(inputs.KINDS)]
    source.mkdir()
    for name in kind.files:
        (shutil.copytree if (base / name).is_dir() else shutil.copyfile)(base / name, source / name)
    file = source / kind.damaged
    data = file.read_bytes()
    new = kind.edit(data, rng)
    file.write_bytes(new)
    if kind.refits and rng.random() < 0.8:
        edits.refit(file)
    words = [word.replace("IN/", f"{source}/") for word in rng.choice(kind.commands)]
    resumes = "--resume" in words and "--out" not in words
    return Case(
        kind.subject, folder, words, [folder / "out", *([source / "run"] if resumes else [])]
    )


def faults_of(ended: sandbox.Ended, case: Case) -> Iterator[str]:
    """Yield what is wrong with the end of a program."""
    yield from ended.forbidden
    if (case.folder / "canary").exists() or (case.folder / "in" / "canary").exists():
        yield "a command in the input was run"
    lines = list(sandbox.error_lines(ended.err))
    if "Traceback (most recent call last)" in ended.err + ended.out:
        yield f"a traceback: {lines[-1] if lines else ended.out[-200:]}"
    elif ended.status < 0 and not (ended.stopped and case.subject in ("commands", "schedules")):
        how = "it does not stop" if ended.stopped else "it died"
        yield f"{how} (signal {-ended.status}): {ended.err[-200:]}"
    elif ended.status > 0 and sum(bool(ERROR.match(line)) for line in lines) != 1:
        yield f"status {ended.status} without one line that says why: {ended.err[-300:]!r}"
    elif ended.status > 0 and not ERROR.match(lines[-1]):
        yield f"an error of several lines: {ended.err[-300:]!r}"
    if ended.peak > MOST_BYTES:
        yield f"it took {ended.peak / 1e6:.0f} MB"
