"""Memory that this process holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def proportional_rss() -> int:
    """Return the proportional set size (PSS) of this process, in bytes.

    Memory shared by n processes counts 1/n in each, so values of several ranks may be added. Falls
    back to `peak_rss` where the system does not report it.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return peak_rss()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
