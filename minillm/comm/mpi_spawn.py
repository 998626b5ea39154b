"""New MPI processes in the places of lost ones, and how they meet the survivors.

The survivors spawn, both sides merge, and one split orders them by their places. A second split is
for the watchdogs, as in `MPICommunicator.shrink`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from mpi4py import MPI


class Merged(NamedTuple):
    """Groups of survivors and new processes, in the order of their places."""

    group: MPI.Comm
    talks: MPI.Comm  # of the watchdogs


def spawn(
    survivors: MPI.Intracomm, places: Sequence[int], size: int, command: Sequence[str]
) -> Merged:
    """Start Python with the arguments `command` for each place of `size` that is not in `places`.

    places[r] is that of survivor r. Collective over the survivors. Raises MPI.Exception.
    """
    free = np.array([place for place in range(size) if place not in places], np.int64)
    info = MPI.Info.Create()
    info.Set("wdir", os.getcwd())
    if on_several_nodes(os.environ):
        # Of the first survivor's node: on one without a survivor, MPI_Init of the new process
        # fails, and the survivors wait in vain (Open MPI 5.0.11).
        info.Set("host", socket.gethostname())
    made = survivors.Spawn(sys.executable, list(command), free.size, info)
    made.Set_errhandler(MPI.ERRORS_RETURN)
    return _merged(made, False, free, places[survivors.Get_rank()])


def on_several_nodes(environment: Mapping[str, str]) -> bool:
    """Return whether Open MPI's mpirun has started ranks on further nodes besides this process's.

    A new process knows of none.
    """
    here, all_ranks = (
        environment.get(f"OMPI_COMM_WORLD_{name}SIZE", "1") for name in ("LOCAL_", "")
    )
    return here.isdigit() and all_ranks.isdigit() and int(here) < int(all_ranks)


def join() -> Merged:
    """Return the groups of this new process and the others. Collective over all of them."""
    free = np.zeros(MPI.COMM_WORLD.Get_size(), np.int64)
    return _merged(MPI.Comm.Get_parent(), True, free, None)


def _merged(made: MPI.Intercomm, new: bool, free: np.ndarray, place: int | None) -> Merged:
    merged = made.Merge(high=new)
    merged.Set_errhandler(MPI.ERRORS_RETURN)
    merged.Bcast(free, 0)  # from a survivor: new processes are high
    own = int(free[MPI.COMM_WORLD.Get_rank()]) if place is None else place
    return Merged(merged.Split(0, own), merged.Split(0, own))
