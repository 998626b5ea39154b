"""Flight recorder: what the ring holds of each communication, and the files it is written to."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun

from minillm.base.errors import CommTimeout
from minillm.base.number_ranges import ranges
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.ledger import ledger
from minillm.comm.recorder import FlightRecorder
from minillm.comm.threads import run_ranks
from minillm.comm.watchdog import describe

PROGRAM = str(Path(__file__).parents[1] / "programs" / "fault_program.py")


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the first line of a file of operations, and the others."""
    head, *rows = map(json.loads, path.read_text().splitlines())
    return head, rows


def here() -> int:
    """Return the line of the caller."""
    return sys._getframe(1).f_lineno


def test_each_operation_has_its_step_and_the_line_of_its_caller(tmp_path: Path) -> None:
    def rank(comm: Communicator) -> list[int]:
        lines = []
        comm.barrier(); lines.append(here())  # fmt: skip  # noqa: E702
        ledger().step = 7
        comm.all_reduce_(np.ones(3, np.float32), MAX); lines.append(here())  # fmt: skip  # noqa: E702
        # Calls that lie deeper inside the communicator.
        comm.reduce_numbers([1.0]); lines.append(here())  # fmt: skip  # noqa: E702
        x = np.ones(5)
        comm.sendrecv(x, comm.rank ^ 1, x.copy(), comm.rank ^ 1); lines.append(here())  # fmt: skip  # noqa: E702
        FlightRecorder(ledger(), tmp_path, comm.rank).dump("the test asked")
        return lines

    lines = run_ranks(2, rank)[1]
    head, rows = read(tmp_path / "flight" / "rank-00001.jsonl")
    assert (head["rank"], head["step"], head["reason"]) == (1, 7, "the test asked")
    assert [(row["axis"], row["step"], row["bytes"]) for row in rows] == [
        ("world", 0, 0), ("world", 7, 12), ("world", 7, 8), ("world", 7, 40), ("world", 7, 40)
    ]  # fmt: skip
    assert [row["place"] for row in rows] == [
        f"comm/test_recorder.py:{line}" for line in (*lines, lines[-1])
    ]
    names = [row["operation"].split()[0] for row in rows]
    assert names == ["barrier", "all_reduce", "all_reduce", "receive", "send"]
    assert all(0 <= row["seconds"] <= row["seconds_ago"] for row in rows)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_ring_holds_the_last_256() -> None:
    def rank(comm: Communicator) -> tuple[int, str]:
        for number in range(300):
            comm.all_reduce_(np.ones(number + 1, np.uint8), MAX)
        first, *_ = ledger().operations
        return len(ledger().operations), str(first.signature[-1])

    assert run_ranks(2, rank) == [(256, "(45,)")] * 2


def test_a_time_out_writes_what_did_not_return(tmp_path: Path) -> None:
    def rank(comm: Communicator) -> None:
        ledger().dump = FlightRecorder(ledger(), tmp_path, comm.rank).dump
        with pytest.raises(CommTimeout):
            comm.barrier() if comm.rank else comm.recv(np.empty(2), 1, 7)

    run_ranks(2, rank, timeout=0.3)
    for number, operation in enumerate(("receive from rank 1 tag 7", "barrier")):
        head, rows = read(tmp_path / "flight" / f"rank-{number:05d}.jsonl")
        assert head["reason"].startswith("waited 0.3 s for")
        assert rows[-1]["operation"] == operation and rows[-1]["seconds"] is None


def test_a_folder_that_cannot_be_written_is_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    FlightRecorder(ledger(), tmp_path / "absent", 3).dump("SIGUSR2")
    error = capfd.readouterr().err
    assert error.startswith("rank 3: SIGUSR2: the last communications cannot be written to")
    assert "No such file" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([1, 0], "0,1"), ([0, 1, 2, 3], "0-3"), ([9, 7, 0, 1, 2], "0-2,7,9")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_ranks_that_do_the_same_share_a_line() -> None:
    states = {rank: "waits for a barrier" for rank in range(1, 9)} | {9: "is busy at a.py:1 (f)"}
    assert describe(states, own=0, size=11).splitlines()[1:] == [
        "  missing: ranks 9,10",
        "  rank 10 does not answer: it is stopped, or hangs",
        "  rank 9 is busy at a.py:1 (f)",
        "  rank 1 waits for a barrier (and ranks 2-8)",
    ]


@needs_mpirun
@pytest.mark.slow
def test_every_rank_of_a_run_tells_its_last_communication(tmp_path: Path) -> None:
    """Hang rank 2 of 3 in step 4 of training. The others wait for it."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    run = tmp_path / "run"
    tiny = "--layers 1 --heads 2 --dim 16 --context 16 --batch 6 --eval-tokens 0 --steps 9"
    options = [*tiny.split(), "--data", str(text), "--out", str(run), "--comm-timeout", "1"]
    done = mpirun(3, [PROGRAM, "hang", "2", *options, "--node-shared", "off"])
    assert done.returncode != 0 and done.output.count("error: waited 1 s") == 1, done.output
    assert "missing: rank 2" in done.output, done.output
    last = r"on '\w+', step \d, \d+ bytes, \w+/\w+\.py:\d+"
    busy = rf"rank 2 is busy at fault_program\.py:\d+ \(hang\); last: \w+.* {last}"
    assert re.search(busy, done.output), done.output
    assert re.search(rf"rank 1 waits for .*; last: \w+.* {last}", done.output), done.output
    found = [read(run / "flight" / f"rank-{rank:05d}.jsonl") for rank in range(3)]
    assert [head["step"] for head, _ in found] == [4, 4, 3]
    for rank, (_, rows) in enumerate(found):
        assert (rows[-1]["seconds"] is None) == (rank < 2), rows[-1]
