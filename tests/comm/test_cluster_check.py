"""Examination of all ranks: planted differences are named, and equal ranks have no problem."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from mpi_helpers import PLANTED, mpirun, needs_mpirun

from minillm import doctor
from minillm.base.findings import Finding, problems
from minillm.comm import cluster_check
from minillm.comm.cluster_check import (
    Facts,
    check_clocks,
    check_cores,
    check_folder,
    check_links,
    check_shared_memory,
    check_speed,
    check_versions,
    examine,
    rate,
)
from minillm.comm.communicator import Communicator
from minillm.comm.probes import Link, Offset
from minillm.comm.shared_folder import FolderTrial
from minillm.comm.threads import run_ranks

USUAL = Facts(
    host="node1",
    versions={"minillm": "1.0", "Python": "3.11.7", "NumPy": "2.1.0", "MPI": "MPICH 5.0.2"},
    sources="commit 1234abcd, files 99",
    kernel="c:avx2",
    cores=[0, 1, 2, 3],
    machine=[0, 1, 2, 3, 4, 5, 6, 7],
    wider="--bind-to none",
    threads=2,
    shared_free=1 << 30,
)
HOSTS = ["node1", "node1", "node2", "node2"]
NODES = [0, 0, 2, 2]


def facts(**odd: object) -> list[Facts]:
    """Return the facts of four ranks on two nodes, of which the last has other values."""
    found = [dataclasses.replace(USUAL, host=host) for host in HOSTS]
    found[3] = dataclasses.replace(found[3], **odd)
    return found


def wrong(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return mark and text of what is not ok."""
    return [(finding.mark, finding.found) for finding in findings if finding.mark != "ok"]


Change = Callable[[Facts], Facts]


@pytest.fixture(autouse=True)
def even_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let thread ranks have equal links, whatever else this machine does."""

    def links(comm: Communicator, seconds: float) -> list[Link]:
        pairs = itertools.combinations(range(comm.size), 2)
        return [Link(first, second, 2e-5, 1e9) for first, second in pairs]

    monkeypatch.setattr(cluster_check, "links", links)


def examined(tmp_path: Path, change: Change, times: Sequence[float] = (1.0,) * 4) -> list[Finding]:
    """Examine four thread ranks on two nodes; `change` alters the facts of the last one."""

    def program(comm: Communicator) -> list[Finding]:
        own = dataclasses.replace(USUAL, host=HOSTS[comm.rank])
        own = change(own) if comm.rank == 3 else own
        return examine(comm, tmp_path, 5.0, lambda: own, lambda: times[comm.rank])

    first, *others = run_ranks(4, program, nodes=NODES)
    assert others == [first] * 3  # so that all end with the same error
    return first


def test_equal_ranks_have_no_problem(tmp_path: Path) -> None:
    found = examined(tmp_path, lambda own: own)
    assert wrong(found) == []
    text = {finding.subject: finding.found for finding in found}
    assert text["ranks"] == "4 on 2 nodes: node1 has 0,1, node2 has 2,3"
    assert text["versions"] == "minillm 1.0, Python 3.11.7, NumPy 2.1.0, MPI MPICH 5.0.2"
    assert text["in nodes"].startswith("2 pairs: latency 20 us to 20 us")
    assert text["between nodes"].endswith(
        "1 pair: latency 20 us to 20 us, bandwidth 1 GB/s to 1 GB/s"
    )


def test_another_version_and_a_slow_rank_are_named(tmp_path: Path) -> None:
    def change(own: Facts) -> Facts:
        return dataclasses.replace(own, versions=own.versions | {"NumPy": "1.26.4"})

    found = wrong(examined(tmp_path, change, [1.0, 1.1, 1.0, 1.6]))
    assert (
        "problem",
        "NumPy is 1.26.4 on rank 3 on node2, elsewhere 2.1.0; install the same on all nodes",
    ) in found
    assert ("problem", "rank 3 on node2: a product takes 1.6 x the median") in found


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ([1.0, 1.0, 1.4, 1.0], []),
        ([1.0, 3.0], ["rank 1 on node1: a product takes 3.0 x the median"]),
        ([2.0, 1.0, 1.0, 1.0], ["rank 0 on node1: a product takes 2.0 x the median"]),
        (
            [1.0, 1.0, 1.9, 1.6, 1.0],
            ["ranks 2,3 on node2: a product takes 1.9 x the median"],
        ),
    ],
)
def test_slow_ranks(times: list[float], named: list[str]) -> None:
    ranks = [*facts(), USUAL][: len(times)]
    assert [words for _, words in wrong(list(check_speed(ranks, times)))] == named


def test_other_sources_are_a_problem_and_other_kernels_a_warning() -> None:
    found = wrong(list(check_versions(facts(sources="files 7", kernel="c:avx512"))))
    assert found == [
        ("problem", "files 7 on rank 3 on node2, elsewhere commit 1234abcd, files 99"),
        ("warning", "c:avx512 on rank 3 on node2, elsewhere c:avx2"),
    ]


def test_clocks_that_are_off_are_named_by_host() -> None:
    offsets = [Offset(0, 0), Offset(2e-3, 1e-5), Offset(-3.25, 1e-5), Offset(-3.25, 1e-5)]
    assert wrong(list(check_clocks(facts(), offsets))) == [
        ("problem", "ranks 2,3 on node2 3.25 s behind node1; synchronize them (chrony, ntp)")
    ]
    (fine,) = check_clocks(facts(), [Offset(0, 0), *[Offset(-2e-3, 1e-4)] * 3])
    assert fine.mark == "ok" and "-2 ms" in fine.found


def test_ranks_that_crowd_on_cores_are_named() -> None:
    ranks = [dataclasses.replace(rank, cores=[0]) for rank in facts()[:2]]
    found = wrong(list(check_cores([*ranks, *facts()[2:]], NODES)))
    words = "ranks 0,1 on node1 share 0, with 7 cores idle; start with --bind-to none"
    assert found == [("problem", words)]
    # As crowded, but there are no others.
    ranks = [dataclasses.replace(rank, machine=[0]) for rank in ranks]
    assert wrong(list(check_cores(ranks, [0, 0]))) == []


def test_other_numbers_of_threads_are_a_warning() -> None:
    assert wrong(list(check_cores(facts(threads=1), NODES))) == [
        ("warning", "1 on rank 3 on node2, elsewhere 2")
    ]


def test_a_slow_link_is_named() -> None:
    pairs = [(0, 2), (0, 3), (2, 3)]
    even = [Link(a, b, 2e-5, 1.2e9) for a, b in pairs]
    assert wrong(list(check_links("between nodes", facts(), even))) == []
    odd = [*even[:2], Link(2, 3, 2e-5, 1e8)]
    assert wrong(list(check_links("between nodes", facts(), odd))) == [
        ("warning", "rank 2 (node2) and rank 3 (node2): 100 MB/s, the median is 1.2 GB/s")
    ]
    assert list(check_links("between nodes", facts(), [])) == []
    assert (rate(12.5e6), rate(3e9)) == ("12.5 MB/s", "3 GB/s")


@pytest.mark.parametrize(("free", "words"), [(64 << 20, "67 MB free"), (-1, "none")])
def test_small_shared_memory_is_named(free: int, words: str) -> None:
    ranks = [dataclasses.replace(rank, shared_free=free) for rank in facts()[2:]]
    ((mark, text),) = wrong(list(check_shared_memory([*facts()[:2], *ranks])))
    assert mark == "problem" and text.startswith(f"{words} in /dev/shm of ranks 2,3 on node2;")


def test_folders_are_named() -> None:
    trial = FolderTrial({1: "Permission denied"}, [2, 3])
    assert wrong(list(check_folder(facts(), Path("runs"), trial))) == [
        ("problem", "runs cannot be written by rank 1 on node1: Permission denied"),
        (
            "problem",
            "runs of ranks 2,3 on node2 is not that of rank 0 on node1; choose one that all nodes "
            "share",
        ),
    ]


def test_findings_are_lines(tmp_path: Path) -> None:
    found = examined(tmp_path, lambda own: dataclasses.replace(own, sources="files 7"))
    text = doctor.report(found)
    assert len(text.splitlines()) == len(found) + 4  # a head, a verdict, empty lines
    assert problems(found) == 1 and text.endswith("1 problem: fix before you train.")


def test_one_process_is_told_to_use_mpirun(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--cluster"]) == 1
    assert "mpirun -n 8" in capsys.readouterr().err


def test_ranks_of_another_minillm_measure_nothing(tmp_path: Path) -> None:
    def change(own: Facts) -> Facts:
        return dataclasses.replace(own, versions=own.versions | {"minillm": "0.9"})

    found = examined(tmp_path, change)
    assert [finding.subject for finding in found] == ["versions", "sources", "products"]
    assert "minillm is 0.9 on rank 3 on node2" in found[0].found


def doctor_lines(rank: int, plant: str, ranks: int, out: Path) -> tuple[int, list[str]]:
    """Return status and problems of `minillm doctor --cluster` with a planted rank."""
    words = ["minillm.doctor", "--cluster", "--seconds", "1", "--out", str(out)]
    done = mpirun(ranks, [PLANTED, str(rank), plant, *words])
    assert "Traceback" not in done.output and done.output.count("error: ") == 1, done.output
    return done.returncode, [x for x in done.output.splitlines() if x.startswith("problem")]


@needs_mpirun
@pytest.mark.slow
def test_a_folder_of_its_own_under_mpirun(tmp_path: Path) -> None:
    for name in ("odd", "usual"):
        (tmp_path / name).mkdir()
    status, lines = doctor_lines(1, "nothing", 2, tmp_path / "{rank}")
    assert status == 1 and any(
        "folder" in line and "of rank 1 on " in line and "is not that of rank 0 on " in line
        for line in lines
    ), lines
    assert [list((tmp_path / name).iterdir()) for name in ("odd", "usual")] == [[], []]


@needs_mpirun
@pytest.mark.slow
def test_another_version_under_mpirun(tmp_path: Path) -> None:
    status, lines = doctor_lines(0, "version", 2, tmp_path)
    assert status == 1 and len(lines) == 1 and "minillm is " in lines[0], lines
    assert "rank 1 on " in lines[0] and "elsewhere 0.0.9" in lines[0]  # a tie


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 2])
def test_a_slow_rank_under_mpirun(odd: int, tmp_path: Path) -> None:
    status, lines = doctor_lines(odd, "slow", 3, tmp_path)
    named = [line for line in lines if line.startswith("problem  speed")]
    assert status == 1 and len(named) == 1 and f"rank {odd} on " in named[0], lines
