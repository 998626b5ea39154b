"""Cores that a process may use, and threads that each rank of a node gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator


def usable_cores() -> int:
    """Return the cores that this process may run on, by affinity and by the container's quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):
        return cores


def threads_per_rank(comm: Communicator) -> int:
    """Return this node's cores divided by its number of ranks, at least 1. Collective."""
    return max(1, usable_cores() // comm.split_by_node().size)
