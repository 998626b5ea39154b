"""Training run on an odd machine: `odd_machine.py ODDITY[:VALUE] minillm.train FLAGS`.

An oddity changes what the system answers to this process; `ODDITIES` lists them.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.training import loop
from minillm.training.trainer import Trainer

DAY = 86400.0
AT = 12  # step before which something happens


def before_step(act: Callable[[Trainer], None], at: int = AT) -> None:
    """Call `act` at the beginning of step `at`, counted from 0."""
    usual = Trainer.step

    def step(self: Trainer, number: int) -> Any:
        if number == at:
            act(self)
        return usual(self, number)

    Trainer.step = step  # type: ignore[method-assign]


def full(value: str) -> None:
    """Limit the size of files to `value` bytes from step AT on, as a quota of a user does."""
    limit = int(value)
    before_step(lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def refuses(value: str) -> None:
    """Fail with an error of the system, by name, when files are synced from step AT on."""
    number = getattr(errno, value)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    def begin(_: Trainer) -> None:
        os.fsync = refuse

    before_step(begin)


def read_only(value: str) -> None:
    """Refuse to make and to rename folders and files from step AT on."""

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def begin(_: Trainer) -> None:
        os.mkdir = os.rename = os.replace = refuse  # type: ignore[assignment]

    before_step(begin)


def vanishes(value: str) -> None:
    """Remove the folder of the run before step AT."""
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    before_step(lambda trainer: shutil.rmtree(out) if trainer.world.rank == 0 else None)


def slow(value: str) -> None:
    """Let every sync of a file take `value` seconds."""
    seconds, usual = float(value), os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(seconds)
        usual(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def clock(value: str) -> None:
    """Let the time of day jump by `value` days back and forth with every look at it."""
    days, usual, looks = float(value), time.time, itertools.count()
    time.time = lambda: usual() + DAY * days * (next(looks) % 3 - 1)


def files(value: str) -> None:
    """Allow `value` open files beyond those of the start of training."""

    def limited(self: loop.Run) -> bool:
        now = 1 + max(map(int, os.listdir("/proc/self/fd")))
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, now + int(value)), most))
        return usual(self)

    usual, loop.Run.train = loop.Run.train, limited  # type: ignore[method-assign]


def all_files(value: str) -> None:
    """Allow `value` open files in all."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(value), int(value)))


def filled(value: str) -> None:
    """Fill the file system of the run before step AT, all but `value` bytes."""
    out = Path(sys.argv[sys.argv.index("--out") + 1])

    def fill(trainer: Trainer) -> None:
        if trainer.world.rank == 0:
            found = os.statvfs(out)
            space = found.f_bavail * found.f_frsize - int(value)
            with open(out.parent / "ballast", "wb") as file:
                file.write(bytes(max(0, space)))

    before_step(fill)


ODDITIES: dict[str, Callable[[str], None]] = {
    "none": lambda value: None,
    "full": full,
    "filled": filled,
    "refuses": refuses,
    "read-only": read_only,
    "vanishes": vanishes,
    "slow": slow,
    "clock": clock,
    "files": files,
    "all-files": all_files,
}

if __name__ == "__main__":
    name, _, given = sys.argv[1].partition(":")
    ODDITIES[name](given)
    sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
