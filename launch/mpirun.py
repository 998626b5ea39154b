"""Command line of mpirun, in the dialects of MPICH and Open MPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minillm.launch.options import Mpi

from minillm.base.errors import ConfigError


class Places(NamedTuple):
    """Ranks on their nodes."""

    nodes: int
    per_node: int
    cores: int | None  # of a rank, to which it is bound; None: not bound
    hosts: Sequence[str] = ()
    hostfile: str | None = None  # instead of `hosts`
    folder: str | None = None  # in which the ranks work; None: that of mpirun
    root: bool = False  # the ranks run as root
    course: str = "stop"  # after the loss of a rank: that of --on-failure


def mpirun(mpi: Mpi, places: Places, program: str = "mpirun") -> list[str]:
    """Return mpirun with its flags, before the command of a rank.

    Raises ConfigError if ranks of MPICH should outlive another one.
    """
    if places.course != "stop" and mpi == "mpich":
        raise ConfigError(
            f"--on-failure {places.course} needs an MPI that outlives a lost rank (ULFM), which "
            "MPICH does not; use --mpi openmpi, or leave --on-failure out"
        )
    flags = {"mpich": _mpich, "openmpi": _open_mpi}[mpi](places)
    return [program, "-n", str(places.nodes * places.per_node), *flags]


def _mpich(places: Places) -> list[str]:
    where = [] if not places.hosts else ["-hosts", ",".join(places.hosts)]
    if places.hostfile is not None:
        where = ["-f", places.hostfile]
    each = [] if places.nodes == 1 else ["-ppn", str(places.per_node)]
    bound = "none" if places.cores is None else f"core:{places.cores}"
    return [*where, *each, "-bind-to", bound, *_folder("-wdir", places)]


def _open_mpi(places: Places) -> list[str]:
    where = []
    if places.hosts:
        where = ["--host", ",".join(f"{host}:{places.per_node}" for host in places.hosts)]
    if places.hostfile is not None:
        where = ["--hostfile", places.hostfile]
    each = f"ppr:{places.per_node}:node"
    bound = ["--map-by", f"{each}:OVERSUBSCRIBE", "--bind-to", "none"]
    # Bound ranks leave no core for new ones, whose start then fails.
    if places.cores is not None and places.course != "respawn":
        bound = ["--map-by", f"{each}:PE={places.cores}", "--bind-to", "core"]
    root = ["--allow-run-as-root"] if places.root else []
    outlives = ["--with-ft", "ulfm"] if places.course != "stop" else []
    return [*outlives, *where, *bound, *_folder("--wdir", places), *root]


def _folder(name: str, places: Places) -> list[str]:
    return [] if places.folder is None else [name, places.folder]


def hostfile_text(mpi: Mpi, hosts: Sequence[str], per_node: int) -> str:
    """Return a hostfile with `per_node` ranks on each host."""
    between = {"mpich": ":", "openmpi": " slots="}[mpi]
    return "".join(f"{host}{between}{per_node}\n" for host in hosts)


def read_hostfile(mpi: Mpi, path: str) -> list[str]:
    """Return the hosts of a hostfile.

    Raises ConfigError if it cannot be read, names no host, or is of the other MPI's form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"--hostfile {path} cannot be read: {reason}") from None
    lines = [line.partition("#")[0].strip() for line in lines]
    lines = [line for line in lines if line]
    other, form = {
        "mpich": (r"\S+\s+(slots|max_slots|max-slots)\s*=", "HOST:RANKS"),
        "openmpi": (r"[^\s:]+:\d+$", "HOST slots=RANKS"),
    }[mpi]
    wrong = [line for line in lines if re.match(other, line)]
    if wrong:
        raise ConfigError(f"--hostfile {path} has {wrong[0]!r}, but --mpi {mpi} reads {form}")
    hosts = [re.split(r"[\s:]", line)[0] for line in lines]
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host")
    return hosts
