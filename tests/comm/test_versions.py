"""Ranks of different versions: one message that names them, before any work."""

from __future__ import annotations

from typing import Any

import pytest
from mpi_helpers import PLANTED, mpirun, needs_mpirun

from minillm.comm import versions
from minillm.comm.agreement import AgreedError
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.comm.versions import check_alike, differences, named, odd_ranks


def test_the_most_frequent_value_is_usual() -> None:
    assert odd_ranks(["a", "b", "b", "c", "c", "b"]) == {"a": [0], "c": [3, 4]}
    assert odd_ranks([1, 1]) == {}
    assert odd_ranks([1, 2]) == {2: [1]}  # a tie: the first rank is right


def test_ranks_are_named_with_their_hosts() -> None:
    hosts = ["a", "a", "b", "c", "d", "e"]
    assert named([2], hosts) == "rank 2 on b"
    assert named([0, 1, 2], hosts) == "ranks 0-2 on a, b"
    assert named(range(1, 6), hosts) == "ranks 1-5 on a, b, c and 2 more"


def test_each_part_that_differs_is_a_clause() -> None:
    usual = {"minillm": "2.0", "NumPy": "2.1", "MPI": "MPICH 5.0.2"}
    found = [usual, usual | {"NumPy": "1.26"}, {"minillm": "1.9", "NumPy": "2.1"}]
    assert differences([usual] * 3, ["a"] * 3) == []
    assert differences(found, ["a", "b", "c"]) == [
        "minillm is 1.9 on rank 2 on c, elsewhere 2.0",
        "NumPy is 1.26 on rank 1 on b, elsewhere 2.1",
        "MPI is none on rank 2 on c, elsewhere MPICH 5.0.2",
    ]


def test_all_ranks_refuse_with_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    own = iter([{"minillm": "1"}, {"minillm": "1"}, {"minillm": "2"}])
    monkeypatch.setattr(versions, "versions", lambda: next(own))

    def program(comm: Communicator) -> Any:
        with pytest.raises(AgreedError) as caught:
            check_alike(comm)
        return str(caught.value)

    first, *others = run_ranks(3, program)
    assert first.startswith("minillm is 2 on rank ") and "elsewhere 1" in first
    assert others == [first] * 2


@needs_mpirun
def test_a_run_refuses_a_rank_of_another_version() -> None:
    words = [PLANTED, "1", "version", "minillm.schedule", "1f1b"]
    done = mpirun(2, words)
    errors = [line for line in done.output.splitlines() if "error" in line]
    assert done.returncode == 1 and len(errors) == 1, done.output
    assert errors[0].startswith("error: minillm is 0.0.9 on rank 1 on ")
    assert "doctor --cluster" in errors[0] and "Traceback" not in done.output
