"""Ctrl-C and SIGTERM finish the step, save and stop; a second one ends the run at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mpi_helpers import finish, mpirun, needs_mpirun, start

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
ENDLESS = ["--steps", "1000000", "--eval-every", "0"]


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int = 3) -> None:
    """Wait until the run has written `steps` lines of metrics."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run has not come to its steps"
        )
        time.sleep(0.05)


def check_saved(run: Path, output: str, ranks: int) -> None:
    """Check that the checkpoint is of the last logged step, and that the run resumes."""
    step = (run / "metrics.jsonl").read_text().count("\n")
    assert f"stopped at step {step} as asked" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    again = mpirun(
        ranks, ["-m", "minillm.train", "--resume", str(run), "--stop-after", str(step + 2)]
    )
    assert again.returncode == 0 and f"at step {step}" in again.output, again.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process(number: signal.Signals, tiny: list[str], tmp_path: Path) -> None:
    process = start(0, ["-m", "minillm.train", *tiny, *ENDLESS])
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(number)
    found = finish(process)
    assert found.returncode == 0 and f"{number.name}: finishing this step" in found.output, (
        found.output
    )
    check_saved(tmp_path / "run", found.output, 0)


@needs_mpirun
@pytest.mark.parametrize("options", [[], ["--pp", "2"]])
def test_ctrl_c_on_mpirun(options: list[str], tiny: list[str], tmp_path: Path) -> None:
    process = start(2, ["-m", "minillm.train", *tiny, *ENDLESS, *options])
    wait_for_steps(process, tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    check_saved(tmp_path / "run", finish(process).output, 2)


@needs_mpirun
def test_sigterm_of_one_rank_stops_all(tiny: list[str], tmp_path: Path) -> None:
    process = start(2, ["-m", "minillm.train", *tiny, *ENDLESS])
    wait_for_steps(process, tmp_path / "run")
    ranks = subprocess.run(
        ["pgrep", "-f", f"minillm.train.*{tmp_path}"], capture_output=True, text=True
    ).stdout.split()
    commands = {
        int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        for pid in ranks
    }
    os.kill(max(pid for pid, command in commands.items() if "python" in command), signal.SIGTERM)
    found = finish(process)
    assert found.returncode == 0, found.output
    check_saved(tmp_path / "run", found.output, 2)


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpirun)])
def test_a_second_signal_aborts(ranks: int, tiny: list[str], tmp_path: Path) -> None:
    process = start(ranks, [PROGRAM, "hang", "0", *tiny, *ENDLESS])
    wait_for_steps(process, tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    found = finish(process, timeout=20)
    assert found.output.count("SIGINT: finishing this step") == 1, found.output
    # At a second Ctrl-C mpirun ends the ranks itself. MPICH's then leaves with 255, now and then 0.
    assert ranks or found.returncode == 128 + signal.SIGINT
    assert "stopped at" not in found.output and not (tmp_path / "run" / "checkpoints").exists()
