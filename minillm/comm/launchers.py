"""Launchers of MPI: their signs in the environment, and the names in what their programs print."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

LAUNCHERS: tuple[tuple[str, str], ...] = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "MPICH's mpirun"),
    ("MV2_COMM_WORLD_SIZE", "MVAPICH's mpirun"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
)
"""Pairs of the environment variable that holds the number of ranks and the launcher's name."""

OPEN_MPI_STOP = "to save and stop, run in another shell: pkill -USR1 prterun"
"""Open MPI's mpirun kills the ranks 0.25 s after SIGINT, SIGTERM and SIGHUP (5.0.11, measured). It
passes SIGUSR1 on and waits."""

MPICH_HANG_UP = "nohup mpirun ... > log"
"""MPICH's mpirun ends at SIGHUP and SIGPIPE, and kills the ranks within 10 ms without any other
signal (5.0.2, measured). Ignored, as by nohup, SIGHUP does nothing; SIGPIPE needs a file."""


class Launch(NamedTuple):
    """Sign of a launcher in the environment."""

    ranks: int
    launcher: str
    variable: str


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Return the number of ranks that a launcher started and its name; None without one."""
    environment = os.environ if environment is None else environment
    for variable, launcher in LAUNCHERS:
        value = environment.get(variable, "")
        if value.isdigit():
            return Launch(int(value), launcher, variable)
    return None


def mpi_family(text: str) -> str | None:
    """Return the MPI family that a version text of a library or an mpirun names."""
    signs = {
        "Intel MPI": r"Intel\(R\) MPI",
        "MVAPICH": "MVAPICH",
        "Open MPI": r"Open MPI|OpenRTE|PRRTE|prterun",
        "MPICH": "MPICH|HYDRA",
    }
    return next((family for family, sign in signs.items() if re.search(sign, text)), None)


def version_in(text: str) -> str:
    """Return the first version number of a text."""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "of unknown version"


def mpi_name(library: str) -> str:
    """Return family and version of the MPI library that describes itself by a text."""
    return f"{mpi_family(library) or 'an unknown MPI'} {version_in(library)}"


def last_words(text: str) -> str:
    """Return the last line of an output that has a word."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else "no output"
