"""Supervised training: killed, stopped and asked to end, it comes to the end of one run."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from minillm.launch import supervise
from mpi_helpers import (
    MPIRUN,
    Launch,
    finish,
    left_behind,
    mpirun,
    mpirun_calls,
    needs_mpirun,
    wait_for_steps,
    wait_until,
)
from run_files import curve


def start(
    words: list[str], cwd: Path, *options: str, ranks: int = 2, program: str = "train"
) -> Launch:
    launcher = [str(MPIRUN), "-n", str(ranks)] if ranks else []
    command = [sys.executable, "-m", "minillm", "supervise", "--wait", "1s", *options, "--"]
    command += [*launcher, sys.executable, "-m", f"minillm.{program}", *words]
    return Launch(command, cwd=cwd)


def first_rank(run: Path) -> int:
    """Return the process of rank 0, which owns the folder."""
    return int((run / "run.lock").read_text().split()[1])


def started_again(process: Launch, run: Path, victim: int) -> bool:
    """Return True if another rank 0 owns the folder, or if the supervisor has ended."""
    try:
        return process.poll() is not None or first_rank(run) != victim
    except (OSError, IndexError):  # the folder has no owner at this moment
        return False


LONG = ["--steps", "300", "--save-every", "20", "--sample-tokens", "0", "--eval-every", "100"]


@needs_mpirun
@pytest.mark.slow
def test_a_killed_rank_costs_no_step(tiny: list[str], tmp_path: Path) -> None:
    """Kill rank 0 twice; the metrics are those of an uninterrupted run, bit for bit."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = mpirun(2, ["-m", "minillm.train", *tiny, *LONG, "--out", str(whole)], timeout=120)
    assert done.returncode == 0, done.output
    process = start([*tiny, *LONG], tmp_path)
    for steps in (50, 130):
        wait_for_steps(process, run, steps)
        os.kill(victim := first_rank(run), signal.SIGKILL)
        wait_until(partial(started_again, process, run, victim))
    found = finish(process, 150)
    assert found.returncode == 0, found.output
    assert curve(run) == curve(whole), found.output
    log = [json.loads(row) for row in (run / supervise.LOG).read_text().splitlines()]
    assert len(log) == 2 and all(row["saved"] > 0 for row in log), found.output
    assert found.output.count("supervise: the run ") == 2 and not left_behind(run)


TASK = ["--task", "classify", "--layers", "2", "--heads", "2", "--dim", "16", "--context", "24"]
TASK += ["--batch", "8", "--steps", "80", "--eval-every", "0"]


@needs_mpirun
@pytest.mark.slow
def test_fine_tuning_is_supervised_alike(tmp_path: Path) -> None:
    """Start from weights, kill a rank; the metrics are those of an uninterrupted run."""
    weights, whole, run = (tmp_path / name for name in ("weights", "whole", "run"))
    first = [*TASK, "--steps", "2", "--out", str(weights)]
    words = ["--task", "classify", "--model", str(weights), *TASK[-6:], "--save-every", "10"]
    asked = [["minillm.finetune", *first], ["minillm.finetune", *words, "--out", str(whole)]]
    done = mpirun_calls(2, asked, timeout=120)
    assert all(each.returncode == 0 for each in done), done
    process = start([*words, "--out", str(run)], tmp_path, program="finetune")
    wait_for_steps(process, run, 25)
    os.kill(first_rank(run), signal.SIGKILL)
    found = finish(process, 150)
    assert found.returncode == 0, found.output
    assert curve(run) == curve(whole), found.output
    (row,) = [json.loads(row) for row in (run / supervise.LOG).read_text().splitlines()]
    assert row["saved"] > 0 and row["status"] != 0 and not left_behind(run), found.output


@needs_mpirun
@pytest.mark.slow
def test_fine_tuning_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    """Kill a rank before the first checkpoint, with one try for each number of ranks."""
    run = tmp_path / "run"
    words = [*TASK, "--save-every", "0", "--out", str(run)]
    process = start(words, tmp_path, "--elastic", "--tries", "1", program="finetune")
    wait_for_steps(process, run, 10)
    os.kill(first_rank(run), signal.SIGKILL)
    found = finish(process, 150)
    assert found.returncode == 0 and "starts again with 1 rank " in found.output, found.output
    assert [row[0] for row in curve(run)] == list(range(1, 81)) and not left_behind(run)


@needs_mpirun
@pytest.mark.slow
def test_sigterm_saves_and_ends(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start([*tiny, "--steps", "1000000", "--eval-every", "0"], tmp_path)
    wait_for_steps(process, run)
    process.terminate()
    found = finish(process)
    assert found.returncode == 0 and "stopped at step" in found.output, found.output
    assert not (run / supervise.LOG).exists() and not left_behind(run)


@needs_mpirun
@pytest.mark.slow
def test_a_stopped_run_is_started_again(tiny: list[str], tmp_path: Path) -> None:
    """Stop rank 0 for good: its heart stands still, and all ranks are ended with it."""
    run = tmp_path / "run"
    process = start([*tiny, *LONG], tmp_path, "--hang", "10s")
    wait_for_steps(process, run, 50)
    os.kill(first_rank(run), signal.SIGSTOP)
    found = finish(process, 150)
    assert found.returncode == 0 and "gave no sign for 10s" in found.output, found.output
    assert [row[0] for row in curve(run)] == list(range(1, 301)) and not left_behind(run)
