"""Measurements between ranks: pairs, offsets of clocks, links, and the trial of a folder."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm.comm import probes
from minillm.comm.communicator import Communicator
from minillm.comm.probes import Link, Offset, clock_offsets, links, tournament
from minillm.comm.shared_folder import FolderTrial, try_folder
from minillm.comm.threads import run_ranks


@pytest.mark.parametrize("number", range(1, 10))
def test_each_pair_meets_once_and_no_rank_twice_a_round(number: int) -> None:
    rounds = list(tournament(number))
    pairs = [pair for pairs in rounds for pair in pairs]
    assert sorted(pairs) == list(itertools.combinations(range(number), 2))
    for round in rounds:
        ranks = [rank for pair in round for rank in pair]
        assert len(set(ranks)) == len(ranks)
    assert len(rounds) == (number - 1 if number % 2 == 0 else number)


def test_offsets_of_clocks_are_those_planted() -> None:
    planted = [0.0, 3.5, -120.0, 1e-3]

    def program(comm: Communicator) -> list[Offset]:
        return clock_offsets(comm, lambda: time.time() + planted[comm.rank])

    for found in run_ranks(4, program):
        for offset, ahead in zip(found, planted, strict=True):
            assert abs(offset.seconds - ahead) <= offset.error + 1e-6


def test_an_answer_that_takes_long_widens_the_error() -> None:
    def program(comm: Communicator) -> list[Offset]:
        def clock() -> float:
            if comm.rank == 1:
                time.sleep(0.005)
            return time.time()

        return clock_offsets(comm, clock)

    offset = run_ranks(2, program)[0][1]
    assert offset.error >= 0.0025 and abs(offset.seconds) <= offset.error


def test_links_of_all_pairs_are_known_to_all() -> None:
    found = run_ranks(3, lambda comm: links(comm, 60.0))
    assert found[0] == found[1] == found[2]
    assert sorted((link.first, link.second) for link in found[0]) == [(0, 1), (0, 2), (1, 2)]
    assert all(link.latency > 0 and link.bandwidth > 0 for link in found[0])


def test_no_round_begins_after_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # seconds on the clock of rank 0

    def link(comm: Communicator, a: int, b: int) -> Link:
        now[0] += 0.02 * (comm.rank == 0)
        return Link(a, b, 1.0, 1.0)

    monkeypatch.setattr(probes, "_link", link)
    monkeypatch.setattr(probes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert len(run_ranks(4, lambda comm: links(comm, 60.0))[0]) == 6
    assert len(run_ranks(4, lambda comm: links(comm, 0.01))[0]) == 2  # one round of two pairs


def trial(comm: Communicator, folders: list[Path]) -> FolderTrial:
    return try_folder(comm, folders[comm.rank], seconds=0.3)


def test_a_shared_folder_is_left_as_it_was(tmp_path: Path) -> None:
    for found in run_ranks(4, lambda comm: trial(comm, [tmp_path] * 4), nodes=(0, 0, 1, 1)):
        assert found == FolderTrial({}, [])
    assert list(tmp_path.iterdir()) == []


def test_ranks_with_another_folder_are_named(tmp_path: Path) -> None:
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    folders = [here, here, there, there]
    for found in run_ranks(4, lambda comm: trial(comm, folders), nodes=(0, 0, 1, 1)):
        assert found == FolderTrial({}, [2, 3])
    assert list(here.iterdir()) == list(there.iterdir()) == []


def test_ranks_that_cannot_write_are_named(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    folders = [file, tmp_path / "gone", tmp_path, tmp_path]
    for found in run_ranks(4, lambda comm: trial(comm, folders), nodes=(0, 1, 2, 3)):
        assert found == FolderTrial({0: "no such folder", 1: "no such folder"}, [])
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_nobody_can_write(tmp_path: Path) -> None:
    found = run_ranks(2, lambda comm: trial(comm, [tmp_path / "gone"] * 2))
    assert found == [FolderTrial({0: "no such folder", 1: "no such folder"}, [])] * 2
