"""A long run with saves, evaluations and restarts, whose memory and handles stay flat.

`PYTHONPATH=tests python -m campaigns soak --minutes 30`. Resident memory, threads and open files of
each rank, and the bytes of shared memory, are read twice a second. The slopes are those of lines
through all readings of a start but its first third. The time of a start counts from its first step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from campaigns import disturbed
from campaigns.disturbed import LINES, TRAIN, Method, Place
from minillm.base.host_memory import PAGE
from minillm.base.record import Record, option

METHODS = (Method("shared", 2, ("--node-shared", "on")), Method("pp", 2, ("--pp", "2")))
METHODS += (Method("zero3", 2, ("--zero", "3")), Method("async", 2, ("--server", "async")))
MOST_SLOPE = 0.5e6  # bytes a minute and rank: 0.7 GB a day
MOST_GROWTH = 2e6  # bytes of a start, below which a slope is noise
SAVE, EVALUATE = 20, 10  # steps between two
FIRST = 120.0  # s until the first step of a start, on a busy machine


@dataclass(frozen=True, kw_only=True)
class Options(Record):
    """Train, save, evaluate and start again for a long time, and measure what grows."""

    minutes: float = option(2.0, above=0)
    """Length of the campaign."""
    starts: int = option(8, at_least=1)
    """Starts of the run, each with the next method of data and model parallelism."""


class Reading(NamedTuple):
    """Sums over all ranks at a moment."""

    seconds: float
    memory: int  # bytes, resident
    files: int
    threads: int
    shared: int  # bytes of /dev/shm, of this run alone


def run(options: Options) -> int:
    """Run the campaign and return the number of faults."""
    began, faults, steps, restarts = time.monotonic(), 0, 0, 0
    with disturbed.workplace("soak") as (top, note):
        (top / "text.txt").write_text(LINES * 20)
        for number in range(options.starts):
            method = METHODS[number % len(METHODS)]
            place = Place(top / method.name)
            seconds = 60 * options.minutes / options.starts
            before = len(disturbed.curve(place.run))
            restarts += disturbed.newest(place.run) > 0
            status, readings = soak(method, place, top / "text.txt", seconds, not note)
            found = list(faults_of(status, readings, place))
            found += disturbed.left(place, not note)
            steps += len(disturbed.curve(place.run)) - before
            faults += len(found)
            print(
                f"{'FAULT' if found else 'ok   '} {method.name}: {describe(readings)}", flush=True
            )
            for text in found:
                print(f"      {text}")
    if note:
        print(f"note: {note}")
    print(
        f"soak: {options.starts} starts ({restarts} of them restarts), {steps} steps, "
        f"{steps // SAVE} saves, {steps // EVALUATE} evaluations, {faults} faults, "
        f"{time.monotonic() - began:.0f} s"
    )
    return faults


def soak(
    method: Method, place: Place, text: Path, seconds: float, alone: bool
) -> tuple[int | None, list[Reading]]:
    """Run a start for a time; return its status and what was read from its ranks."""
    flags = "--layers 2 --heads 2 --dim 32 --context 32 --batch 8 --eval-tokens 2048"
    flags += f" --steps 100000000 --save-every {SAVE} --eval-every {EVALUATE} --sample-tokens 0"
    words = [*flags.split(), *method.words, "--data", str(text), "--out", str(place.run)]
    if disturbed.newest(place.run):
        words = ["--resume", str(place.run)]
    known = len(disturbed.curve(place.run))
    process = disturbed.start(method, place, [*TRAIN, *words])
    began, readings, most = time.monotonic(), list[Reading](), FIRST
    while process.poll() is None and (now := time.monotonic() - began) < most:
        if not readings and len(disturbed.curve(place.run)) > known:
            most = now + seconds
        if most != FIRST:
            readings.append(read(place, now, alone))
        time.sleep(0.5)
    for number in ranks(place):
        disturbed.send(number, signal.SIGTERM)
    return disturbed.wait(process, place, 60), readings


def ranks(place: Place) -> list[int]:
    """Return the processes of a run that train."""
    return [n for n in disturbed.living(place.mark) if b"minillm.train" in _bytes(n, "cmdline")
            and b"mpirun" not in _bytes(n, "cmdline")]  # fmt: skip


def _bytes(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def read(place: Place, seconds: float, alone: bool) -> Reading:
    """Return what all ranks use now."""
    memory = files = threads = 0
    processes = ranks(place)
    for number in processes:
        memory += int((_bytes(number, "statm").split() or [b"0", b"0"])[1]) * PAGE
        for name in ("fd", "task"):
            try:
                count = len(os.listdir(f"/proc/{number}/{name}"))
            except OSError:
                count = 0
            files, threads = (files + count, threads) if name == "fd" else (files, threads + count)
    return Reading(seconds, memory, files, threads, disturbed.shared_memory(processes, alone))


def settled(readings: list[Reading]) -> np.ndarray:
    """Return the readings behind the first third, float64 [N, 5]; the last one, of an end, not."""
    return np.array(readings[len(readings) // 3 : -1], np.float64).reshape(-1, 5)


def slopes(readings: list[Reading]) -> np.ndarray:
    """Return the growth of each number per minute, float64 [4]."""
    found = settled(readings)
    if len(found) < 3:
        return np.zeros(4)
    minutes = (found[:, 0] - found[:, 0].mean()) / 60
    return minutes @ found[:, 1:] / (minutes @ minutes)


def faults_of(status: int | None, readings: list[Reading], place: Place) -> Iterator[str]:
    """Yield what is wrong with a start: its end, or a number that grows."""
    if status != 0:
        yield f"it ended with status {status}: {disturbed.output(place)[-700:]}"
    steps = [row.step for row in disturbed.curve(place.run)]
    if steps != list(range(1, len(steps) + 1)):
        yield "the metrics have a gap"
    found = settled(readings)
    if len(found) < 3:
        yield f"only {len(readings)} readings"
        return
    minutes = (found[-1, 0] - found[0, 0]) / 60
    memory, *counts, shared = slopes(readings)
    if memory > MOST_SLOPE and memory * minutes > MOST_GROWTH:
        yield f"resident memory grows by {memory / 1e6:.2f} MB a minute"
    for name, slope in zip(("open files", "threads"), counts, strict=True):
        if slope * minutes > 2:
            yield f"{name} grow by {slope:.1f} a minute"
    if shared > MOST_SLOPE and shared * minutes > MOST_GROWTH:
        yield f"shared memory grows by {shared / 1e6:.2f} MB a minute"


def describe(readings: list[Reading]) -> str:
    """Return levels and slopes in a line."""
    found = settled(readings)
    if len(found) < 3:
        return f"{len(readings)} readings"
    memory, files, threads, shared = found[:, 1:].mean(axis=0)
    slope = slopes(readings)
    return (
        f"memory {memory / 1e6:.1f} MB {slope[0] / 1e6:+.3f} a minute, files {files:.1f} "
        f"{slope[1]:+.2f}, threads {threads:.1f} {slope[2]:+.2f}, shared {shared / 1e6:.1f} MB "
        f"{slope[3] / 1e6:+.3f}, {len(found)} readings"
    )
