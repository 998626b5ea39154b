"""Threads of each rank: affinity masks, quotas of control groups, OMP_NUM_THREADS and --threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from minillm import kernels
from minillm.comm import cores
from minillm.comm.communicator import Communicator
from minillm.comm.cores import ThreadShare, cgroup_quota, share_of_cores, thread_share
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks


@pytest.mark.parametrize(
    ("masks", "each"),
    [
        ([{0, 1, 2, 3}], [4]),
        ([{0, 1, 2, 3}] * 2, [2, 2]),  # not pinned
        ([{0, 1, 2, 3, 4, 5, 6, 7}, set(range(8, 16))], [8, 8]),  # pinned, disjoint
        ([{0, 1}, {1, 2}, {2, 3}], [1, 1, 1]),  # a chain: 4 cores for 3 ranks
        ([{0, 1, 2, 3}, {0, 1, 2, 3}, {4}], [2, 2, 1]),  # two share a socket
    ],
)
def test_ranks_share_the_cores_of_overlapping_masks(masks: list[set[int]], each: list[int]) -> None:
    shares = [share_of_cores(masks, rank) for rank in range(len(masks))]
    assert [max(1, size // ranks) for size, ranks in shares] == each


def groups(root: Path, own: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu/"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3.0),  # of the parent
        (
            "0::/a/b\n",
            {
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            3.0,
        ),
        (
            "4:cpu,cpuacct:/docker/1f\n3:memory:/m\n",
            {V1 + "cpu.cfs_quota_us": "250000\n", V1 + "cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            "4:cpu:/job\n",
            {V1 + "job/cpu.cfs_quota_us": "-1\n", V1 + "job/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("", {}, None),
    ],
)
def test_quotas_of_control_groups(
    own: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cgroup_quota(groups(tmp_path, own, files)) == quota
    assert cgroup_quota(tmp_path / "nothing") is None


def limits(
    monkeypatch: pytest.MonkeyPatch, mask: set[int], quota: float | None, omp: str | None
) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: mask)
    monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)


@pytest.mark.parametrize(
    ("quota", "omp", "asked", "share"),
    [
        (None, None, None, ThreadShare(6, "6 cores")),
        (3.5, None, None, ThreadShare(3, "a quota of 3.5 cores")),
        (0.5, None, None, ThreadShare(1, "a quota of 0.5 cores")),
        (64.0, "4", None, ThreadShare(4, "OMP_NUM_THREADS=4")),
        (None, "3,2", None, ThreadShare(3, "OMP_NUM_THREADS=3")),  # by nesting level
        (None, "8", None, ThreadShare(6, "6 cores")),  # an upper bound only
        (None, "many", None, ThreadShare(6, "6 cores")),
        (None, "0", None, ThreadShare(6, "6 cores")),
        (2.0, "1", 5, ThreadShare(5, "--threads 5")),  # the flag decides
    ],
)
def test_the_smallest_limit_counts_and_the_flag_overrides(
    quota: float | None,
    omp: str | None,
    asked: int | None,
    share: ThreadShare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits(monkeypatch, set(range(6)), quota, omp)
    comm = SelfCommunicator()
    assert thread_share(comm, asked) == share
    with cores.use_threads(comm, asked):
        assert kernels.get_threads() == share.threads and cores.threads_in_use() == share
        with kernels.threads(share.threads + 1):  # someone else's number has no reason
            assert cores.threads_in_use() == ThreadShare(share.threads + 1, "")
    assert kernels.get_threads() == 1


def test_ranks_of_a_node_share_its_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, set(range(16)), 6.0, None)

    def program(comm: Communicator) -> ThreadShare:
        return thread_share(comm)

    assert run_ranks(2, program) == [ThreadShare(3, "a quota of 6 cores")] * 2
    assert run_ranks(2, program, nodes=(0, 1)) == [ThreadShare(6, "a quota of 6 cores")] * 2
    limits(monkeypatch, set(range(16)), None, None)
    share = run_ranks(4, program)[3]
    assert share == ThreadShare(4, "16 cores for 4 ranks")
    assert share.words(" each") == "4 threads each (16 cores for 4 ranks)"


@pytest.mark.parametrize(("limit", "threads"), [(0, 1), (1, 1), (3, 2), (6, 3), (7, 4), (99, 4)])
def test_a_limit_of_the_system_leaves_fewer_threads(
    limit: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[threading.Thread] = []
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(running) >= limit:
            raise RuntimeError("can't start new thread")
        start(thread)
        running.append(thread)

    before = threading.active_count()
    limits(monkeypatch, set(range(4)), None, None)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with cores.use_threads(SelfCommunicator()):
        assert kernels.get_threads() == threads
        assert ("ulimit -u" in cores.threads_in_use().reason) == (threads < 4)
    assert threading.active_count() == before
