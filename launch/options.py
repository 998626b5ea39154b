"""Options that every kind of launch shares, and what follows from them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillm.base.errors import ConfigError
from minillm.base.record import Record, flag, option
from minillm.base.requirements import installed_version
from minillm.comm.launchers import mpi_family

Mpi = Literal["mpich", "openmpi"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Kind(NamedTuple):
    """Kind of launch."""

    sentence: str
    options: type[LaunchOptions]
    run: Callable[[Any, Sequence[str]], str]  # (options, words of train) -> the text to print


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(Record):
    """Ranks and their places."""

    nodes: int = option(1, at_least=1)
    """Nodes."""
    ranks_per_node: int = option(4, at_least=1)
    """MPI ranks on each node."""
    cores_per_rank: int | None = option(None, at_least=1)
    """Cores of each rank, to which it is bound; left out: 1, and for `local` the share of this
    machine's cores."""
    mpi: Literal["auto", "mpich", "openmpi"] = "auto"
    """MPI library of the ranks; auto: the one of this environment, or of the image's name."""

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class JobOptions(LaunchOptions):
    """Job of a cluster."""

    name: str = "minillm"
    """Name of the job; without --out and --resume the run goes to runs/NAME."""
    gpus_per_rank: int = option(0, at_least=0, below=2)
    """GPUs of each rank: 1 trains with --device cuda, 0 on the processors."""
    memory: str | None = None
    """Memory of each node, as in 64G; left out: the default of the cluster."""
    time: str | None = None
    """Time limit, as in 90m, 24h, 7d or 1-12:00:00; left out: that of the cluster."""
    save_time: str = "5m"
    """Time before the end of the job that is left for the last step and its checkpoint."""
    partition: str | None = None
    """Partition of Slurm; in Kubernetes the queue of the scheduler."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a size, a time or a name that no scheduler reads."""
        super().__post_init__()
        self.seconds()
        self.save_seconds()
        if self.memory is not None and not re.fullmatch(r"[1-9]\d*[MGT]", self.memory):
            raise ConfigError(f"--memory {self.memory} must be a size as 500M, 64G or 1T")
        for name in ("name", "partition"):
            refuse_control(flag(name), getattr(self, name))

    def seconds(self) -> int | None:
        """Return the time limit in seconds."""
        return None if self.time is None else seconds_of(self.time, "--time")

    def save_seconds(self) -> int:
        """Return the time for the last checkpoint in seconds."""
        return seconds_of(self.save_time, "--save-time")

    def with_device(self, words: Sequence[str]) -> list[str]:
        """Return the flags of train with `--device cuda` if a rank has a GPU and none is named."""
        named = any(word.split("=")[0] == "--device" for word in words)
        return [*words, *([] if named or not self.gpus_per_rank else ["--device", "cuda"])]


def refuse_control(name: str, value: str | None) -> None:
    """Raise ConfigError for a value that would begin another line or another word of a script."""
    if value is not None and (not value.isprintable() or re.search(r"\s", value)):
        raise ConfigError(f"{name} {value!r} must be one word without control characters")


def seconds_of(text: str, name: str) -> int:
    """Return a duration in seconds: 90m, 24h, 7d, or [D-]HH:MM[:SS].

    Raises ConfigError that begins with the flag `name`.
    """
    if found := re.fullmatch(r"(\d{1,9})([smhd])", text):
        seconds = int(found[1]) * _UNITS[found[2]]
    elif found := re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,4}):([0-5]\d)(?::([0-5]\d))?", text):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    else:
        raise ConfigError(f"{name} {text} must be a time as 90m, 24h, 7d or 1-12:00:00")
    if not seconds:
        raise ConfigError(f"{name} {text} must be more than 0")
    return seconds


def mpi_of(asked: str) -> Mpi:
    """Return the MPI library that `asked` names, for auto the one of this environment.

    Raises ConfigError if there is none, or another one.
    """
    names: dict[str | None, Mpi] = {"MPICH": "mpich", "Open MPI": "openmpi"}
    for name in names.values():
        if asked == name or (asked == "auto" and installed_version(name) is not None):
            return name
    program = shutil.which("mpirun")
    family = None
    if program is not None:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
        family = mpi_family(done.stdout + done.stderr)
    if family not in names:
        raise ConfigError(
            f"no MPI was found here ({family or 'no mpirun'}); name the one of the ranks with "
            "--mpi mpich or --mpi openmpi"
        )
    return names[family]


def program_path(name: str) -> str:
    """Return the path of a program of this Python's environment, its bare name if it has none."""
    path = Path(sys.prefix) / "bin" / name
    return str(path) if os.access(path, os.X_OK) else name
