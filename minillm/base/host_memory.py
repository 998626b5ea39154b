"""Memory of this process and of the machine, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from minillm.base.control_groups import group_folders

PAGE = os.sysconf("SC_PAGE_SIZE")
SHARED_MEMORY = Path("/dev/shm")
SMALL_SHARED_MEMORY = 256 << 20
"""Bytes; containers often get 64 MB, too little for the buffers of a few MPI ranks."""
# Version -> files of the limit and the usage, and the entry of memory.stat for idle page cache.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def size(num_bytes: float) -> str:
    """Format bytes in units of 10^6 and more: 33116000000 is 33.1 GB, 86200000 is 86 MB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes / 1e6:.{0 if num_bytes >= 1e7 else 1}f} MB"


def peak_rss() -> int:
    """Return the peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def resident() -> int:
    """Return the resident memory of this process; the peak where the system reports no other."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return peak_rss()


def proportional_rss() -> int:
    """Return the proportional set size (PSS) of this process.

    Memory shared by n processes counts 1/n in each, so values of several ranks may be added. Falls
    back to `peak_rss` where the system does not report it.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return peak_rss()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def available() -> int:
    """Return what new arrays of this node may take: of the machine, and of each control group."""
    return max(0, min((_machine(), *_control_groups())))


def _machine() -> int:
    """Return MemAvailable, which counts what the kernel can reclaim; else all physical memory."""
    found = _table(Path("/proc/meminfo"))
    if "MemAvailable:" in found:
        return found["MemAvailable:"] << 10
    return os.sysconf("SC_PHYS_PAGES") * PAGE


def _control_groups(root: Path = Path("/")) -> Iterator[int]:
    """Yield the memory left in each control group of this process and in their parents."""
    for version, folder in group_folders("memory", root):
        yield from _left(folder, *_FILES[version])


def _left(group: Path, limit: str, usage: str, idle: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
    except (OSError, ValueError):
        return
    if most.isdigit():  # "max": no limit
        yield int(most) - used + _table(group / "memory.stat").get(idle, 0)


def _table(path: Path) -> Mapping[str, int]:
    """Return the lines `name number` of a file of the kernel."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
