"""Versions of the parts that all ranks must have alike, and the ranks that have others."""

from __future__ import annotations

import platform
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.base.number_ranges import ranges
from minillm.base.requirements import own_version
from minillm.comm.agreement import AgreedError
from minillm.comm.communicator import Communicator
from minillm.comm.launchers import mpi_name


def versions() -> dict[str, str]:
    """Return the versions of this process by part: minillm, Python, NumPy, and MPI if it runs."""
    found = {
        "minillm": own_version(),
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        found["MPI"] = mpi_name(mpi.Get_library_version())
    return found


def odd_ranks(values: Sequence[Any]) -> dict[Any, list[int]]:
    """Return the ranks of each value but the most frequent one, of those the first. Hashable."""
    usual = Counter(values).most_common(1)[0][0]
    odd: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        if value != usual:
            odd.setdefault(value, []).append(rank)
    return odd


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks with their hosts: rank 3 on node2, ranks 4-7 on node2, node3."""
    places = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    return f"rank{'s' * (len(ranks) > 1)} {ranges(ranks)} on {shown}"


def differences(found: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """Return a clause for each part of which some ranks have another version.

    `found` and `hosts` have an entry for each rank.
    """
    clauses = []
    for part in found[0]:
        values = [each.get(part, "none") for each in found]
        usual = Counter(values).most_common(1)[0][0]
        for value, ranks in odd_ranks(values).items():
            clauses.append(f"{part} is {value} on {named(ranks, hosts)}, elsewhere {usual}")
    return clauses


def check_alike(comm: Communicator) -> None:
    """Raise AgreedError if the ranks have different versions. Collective."""
    everyone = comm.gather_json([versions(), socket.gethostname()])
    if found := differences(*zip(*everyone, strict=True)):
        raise AgreedError(
            f"{'; '.join(found)}. Install the same on all nodes; minillm doctor --cluster under "
            "the same mpirun compares them"
        )
