"""Binding of ranks to cores: the affinity mask in one line, with the flag that widens it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.base.control_groups import group_folders
from minillm.base.number_ranges import ranges, read_ranges
from minillm.comm.cores import affinity
from minillm.comm.launchers import launched

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator

WIDEST = 11  # columns of a mask; the cores of a longer one are counted
# Version of control groups -> file with the cores of a group.
_FILES = {1: "cpuset.cpus", 2: "cpuset.cpus.effective"}
# Launcher -> its flags that give a rank more cores.
_WIDER = {
    "Open MPI's mpirun": "--bind-to none or --map-by :PE=N",
    "MPICH's mpirun": "-bind-to none or -bind-to core:N",
    "srun": "--cpu-bind=none or -c N",
}


def machine_cores(root: Path = Path("/")) -> set[int]:
    """Return the cores that this machine has, or its container's share of them (cpuset).

    `root` is the root of the file system.
    """
    cores = set(range(os.cpu_count() or 1)) | affinity()
    for version, folder in group_folders("cpuset", root):
        try:
            cores &= read_ranges((folder / _FILES[version]).read_text()) or cores
        except (OSError, ValueError):
            continue
    return cores | affinity()


def wider(machine: Iterable[int], environment: Mapping[str, str] | None = None) -> str:
    """Return the flag by which the launcher of this process gives a rank more cores.

    Without a launcher, the command that gives a process the cores of `machine`.
    """
    environment = os.environ if environment is None else environment
    found = launched(environment)
    if found is None:
        return f"taskset -c {_short(machine, 'CORES')}"
    name = found.launcher
    if "SLURM_STEP_NUM_TASKS" in environment and "HYDI_CONTROL_FD" not in environment:
        # srun sets PMI_SIZE as well, for a library of MPICH; Hydra leaves a sign of its own.
        name = name if name == "Open MPI's mpirun" else "srun"
    return _WIDER.get(name, f"the binding of {name}")


def _short(cores: Iterable[int], instead: str) -> str:
    text = ranges(cores)
    return text if len(text) <= WIDEST else instead


def bound_words(
    masks: Sequence[Sequence[int]], cores: Sequence[int], hints: Sequence[str], one_node: bool
) -> str:
    """Return the narrowest affinity mask of all ranks, in a line of at most 72 columns.

    Of each rank, `masks` has the cores, `cores` the number of its machine's, and `hints` the flag
    that widens the mask, which is shown if the machine has more.
    """

    def breadth(rank: int) -> tuple[bool, int]:
        return len(masks[rank]) >= cores[rank], len(masks[rank])

    least, several = min(range(len(masks)), key=breadth), len(masks) > 1
    text = _short(masks[least], f"{len(masks[least])} cores")
    if len(masks[least]) < cores[least]:
        who = f"rank {least}: " if several else ""
        return f"{who}{text} of {cores[least]}; wider: {hints[least]}"
    place = "all of this machine" if one_node else "all of each machine"
    among = f", shared by {len(masks)} ranks" if several and one_node else ""
    return f"{text}, {place}{among}"


def own_words() -> str:
    """Return the affinity mask of this process (see `bound_words`)."""
    machine = machine_cores()
    return bound_words([sorted(affinity())], [len(machine)], [wider(machine)], True)


def narrowest(comm: Communicator) -> str:
    """Return the line of the plan about affinity masks (see `bound_words`). Collective."""
    machine = machine_cores()
    found = comm.gather_json([sorted(affinity()), len(machine), wider(machine)])
    masks, cores, hints = zip(*found, strict=True)
    return bound_words(masks, cores, hints, comm.split_by_node().size == comm.size)
