"""Cores that a process may use, and threads that each rank of a node gets."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minillm.base.control_groups import group_folders

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator

# Version of control groups -> files of a quota and its period.
_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}


class ThreadShare(NamedTuple):
    """Threads of a rank's kernels."""

    threads: int
    reason: str  # what limits them, in words

    def words(self, each: str = "") -> str:
        """Return the number with its noun and the reason, if there is one."""
        words = f"{self.threads} thread{'s' * (self.threads != 1)}{each}"
        return f"{words} ({self.reason})" if self.reason else words


_in_use: ContextVar[ThreadShare] = ContextVar("thread_share")


def affinity() -> set[int]:
    """Return the cores that the scheduler may run this process on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Return the cores' worth of time that control groups grant, or None without a limit.

    The least of the quotas of this process's group and of the groups around it, of version 1 and
    2. `root` is the root of the file system.
    """
    quotas = (_quota(folder, _FILES[version]) for version, folder in group_folders("cpu", root))
    return min(filter(None, quotas), default=None)


def _quota(folder: Path, files: tuple[str, ...]) -> float | None:
    """Return the quota that a group's folder states, in cores; None without one."""
    try:
        quota, period = map(int, " ".join((folder / f).read_text() for f in files).split())
    except (OSError, ValueError):  # no such file, or the word max
        return None
    return quota / period if quota > 0 and period > 0 else None  # -1: no limit


def usable_cores() -> int:
    """Return the cores that this process may run on, by affinity and by the container's quota."""
    quota = cgroup_quota()
    cores = len(affinity())
    return cores if quota is None else max(1, min(cores, int(quota)))


def omp_limit() -> int | None:
    """Return the first number of OMP_NUM_THREADS, or None if it names no positive one."""
    word = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(word) if word.isascii() and word.isdigit() and int(word) > 0 else None


def share_of_cores(masks: list[set[int]], rank: int) -> tuple[int, int]:
    """Return the cores that `rank` shares with others, and how many ranks share them.

    `masks` has the affinity mask of each rank of a node. Ranks share cores if their masks overlap,
    or if both overlap with a third rank's.
    """
    cores, sharing = set(masks[rank]), {rank}
    while more := {i for i, mask in enumerate(masks) if i not in sharing and mask & cores}:
        sharing |= more
        cores |= set().union(*(masks[i] for i in more))
    return len(cores), len(sharing)


def thread_share(comm: Communicator, asked: int | None = None) -> ThreadShare:
    """Return the threads of this rank's kernels. Collective.

    `asked` is the number that the user gave. Without it, the ranks of a node divide the cores that
    their affinity masks and the quota leave them. OMP_NUM_THREADS is an upper bound.
    """
    node = comm.split_by_node()
    everyone = node.gather_json([sorted(affinity()), cgroup_quota()])
    if asked is not None:
        return ThreadShare(asked, f"--threads {asked}")
    cores, ranks = share_of_cores([set(mask) for mask, _ in everyone], node.rank)
    among = f" for {ranks} ranks" if ranks > 1 else ""
    best = ThreadShare(max(1, cores // ranks), f"{cores} core{'s' * (cores > 1)}{among}")
    quotas = [quota for _, quota in everyone if quota is not None]
    if quotas and (each := max(1, int(min(quotas) / node.size))) < best.threads:
        best = ThreadShare(each, f"a quota of {min(quotas):.3g} cores")
    bound = omp_limit()
    if bound is not None and bound < best.threads:
        best = ThreadShare(bound, f"OMP_NUM_THREADS={bound}")
    return best


@contextmanager
def use_threads(comm: Communicator, asked: int | None = None) -> Iterator[None]:
    """Let this context's kernels use this rank's `thread_share`. Collective.

    The kernels use fewer threads where the system refuses to start so many.
    """
    from minillm import kernels  # needs NumPy, and `minillm doctor` does without

    share = thread_share(comm, asked)
    if (started := startable(share.threads)) < share.threads:
        share = ThreadShare(started, "as many as the system starts: ulimit -u")
    token = _in_use.set(share)
    try:
        with kernels.threads(share.threads):
            yield
    finally:
        _in_use.reset(token)


def threads_in_use() -> ThreadShare:
    """Return the threads of this context's kernels, and why there are so many."""
    from minillm import kernels

    share, threads = _in_use.get(None), kernels.get_threads()
    return share if share is not None and share.threads == threads else ThreadShare(threads, "")


def startable(wanted: int) -> int:
    """Return how many of `wanted` threads a rank can have, its first included.

    Each further one stands twice: in the pool of the C kernels and in that of NumPy's. One more
    watches the rank's waits.
    """
    release = threading.Event()
    helpers: list[threading.Thread] = []
    try:
        for _ in range(2 * (wanted - 1) + 1):
            helper = threading.Thread(target=release.wait, daemon=True)
            helper.start()
            helpers.append(helper)
    except RuntimeError:  # can't start new thread
        return 1 + max(0, len(helpers) - 1) // 2
    finally:
        release.set()
        for helper in helpers:
            helper.join()
    return wanted
