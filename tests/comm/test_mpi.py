"""The communicator over real MPI processes, and how ranks end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mpi_helpers import finish, mpirun, needs_mpirun, start

PROGRAM = str(Path(__file__).with_name("mpi_program.py"))

pytestmark = needs_mpirun


@pytest.mark.parametrize("n", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_collectives(n: int) -> None:
    done = mpirun(n, [PROGRAM, "all", str(n)])
    assert done.returncode == 0 and "passed 6" in done.output, done.output


@pytest.mark.slow
def test_waits_end_after_the_time_out_and_not_before() -> None:
    done = mpirun(3, [PROGRAM, "waits", "3"])
    assert done.returncode == 0 and "passed 4" in done.output, done.output


@pytest.mark.parametrize(
    ("fault", "wait", "state"),
    [
        ("stopped", "an all_reduce on 'world'", r"rank 2 does not answer: it is stopped"),
        ("late", "an all_gather on 'world'", r"rank 1 is busy at mpi_program.py:\d+ \(dawdle\)"),
    ],
)
def test_a_time_out_names_the_rank_that_is_missing(fault: str, wait: str, state: str) -> None:
    done = mpirun(4, [PROGRAM, fault, "4"])
    assert done.returncode != 0
    assert f"rank 0: error: waited 1 s (--comm-timeout) for {wait}" in done.output, done.output
    assert re.search(state, done.output), done.output
    assert re.search(rf"rank [12] waits for {wait}; last: .*\(and rank 3\)", done.output), (
        done.output
    )
    assert done.output.count("error: waited") == 1


def test_an_error_of_one_rank_alone_is_printed_by_it_and_ends_all() -> None:
    done = mpirun(3, [PROGRAM, "alone", "3"])
    assert done.returncode != 0
    assert "rank 1: error: only this rank sees the planted fault" in done.output


def test_one_rank_raises_and_all_end() -> None:
    done = mpirun(3, [PROGRAM, "raises", "3"])
    assert done.returncode != 0
    assert "rank 1: ValueError: planted failure" in done.output
    assert "rank 1: Traceback" in done.output


def test_signals_under_way_at_the_end_are_taken() -> None:
    done = mpirun(4, [PROGRAM, "chatty", "4"])
    assert done.returncode == 0 and "KILLED" not in done.output, done.output


def test_several_starts_in_a_process_share_a_watchdog() -> None:
    done = mpirun(3, [PROGRAM, "again", "3"])
    assert done.returncode == 0 and "KILLED" not in done.output, done.output


def test_one_rank_killed_and_all_end() -> None:
    done = mpirun(3, [PROGRAM, "killed", "3"])
    assert done.returncode != 0
    assert re.search(r"signal:? 9\b", done.output, re.IGNORECASE), done.output


def test_an_agreed_error_is_printed_once() -> None:
    done = mpirun(3, [PROGRAM, "bad_option", "3"])
    assert done.returncode == 1
    assert done.output.count("the planted option is wrong") == 1
    assert "rank 1: the planted option" in done.output and "Traceback" not in done.output


def test_ranks_that_call_different_collectives_are_named() -> None:
    done = mpirun(2, [PROGRAM, "different", "2"])
    assert done.returncode != 0
    assert (
        "error: ranks of 'world' call different collectives: number 1 is all_gather float32 (3,) "
        "dim 0 on ranks [0], but all_reduce sum float32 (3,) on ranks [1]" in done.output
    )


def test_the_launcher_of_another_mpi_is_named() -> None:
    """Check the error where the launcher started 4 ranks and the MPI library sees one."""
    done = finish(start(0, [PROGRAM, "all", "1"], env={"OMPI_COMM_WORLD_SIZE": "4"}))
    assert done.returncode == 1
    assert (
        "started 4 ranks, but the MPI library in use sees 1" in done.output
        and "pip install" in done.output
    )
