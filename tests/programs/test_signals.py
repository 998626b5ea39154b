"""Signals finish the step, save and stop; a second one ends the run at once."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mpi_helpers import (
    Launch,
    environment,
    family,
    finish,
    mpirun,
    needs_mpirun,
    start,
    wait_for_steps,
    wait_until,
)

from minillm.comm import signals
from minillm.comm.signals import StopRequest
from minillm.train import main

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
ENDLESS = ["--steps", "1000000", "--eval-every", "0"]


def check_saved(run: Path, output: str, ranks: int) -> None:
    """Check that the checkpoint is of the last logged step, and that the run resumes."""
    step = (run / "metrics.jsonl").read_text().count("\n")
    assert f"stopped at step {step} as asked" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    again = mpirun(
        ranks, ["-m", "minillm.train", "--resume", str(run), "--stop-after", str(step + 2)]
    )
    assert again.returncode == 0 and f"at step {step}" in again.output, again.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_one_process(number: signal.Signals, tiny: list[str], tmp_path: Path) -> None:
    process = start(0, ["-m", "minillm.train", *tiny, *ENDLESS])
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(number)
    found = finish(process)
    assert found.returncode == 0 and f"{number.name}: finishing this step" in found.output, (
        found.output
    )
    check_saved(tmp_path / "run", found.output, 0)


def test_a_run_reports_its_place_and_its_communication_and_goes_on(
    tiny: list[str], tmp_path: Path
) -> None:
    process, run = start(0, ["-m", "minillm.train", *tiny, *ENDLESS]), tmp_path / "run"
    wait_for_steps(process, run)
    for _ in range(2):
        file = run / "flight" / "rank-00000.jsonl"
        process.send_signal(signal.SIGUSR2)
        wait_until(file.exists)
        file.unlink()
        wait_for_steps(process, run, 1 + (run / "metrics.jsonl").read_text().count("\n"))
    process.send_signal(signal.SIGTERM)
    found = finish(process)
    assert found.returncode == 0, found.output
    assert "rank 0: SIGUSR2: the last communications are in" in found.output, found.output
    assert re.search(r'File ".*", line \d+ in', found.output), found.output


@needs_mpirun
@pytest.mark.parametrize("options", [[], ["--pp", "2"]])
def test_ctrl_c_on_mpirun(options: list[str], tiny: list[str], tmp_path: Path) -> None:
    process = start(2, ["-m", "minillm.train", *tiny, *ENDLESS, *options])
    wait_for_steps(process, tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    check_saved(tmp_path / "run", finish(process).output, 2)


@needs_mpirun
@pytest.mark.slow
def test_a_closed_terminal_ends_mpich_unless_it_is_ignored(tiny: list[str], tmp_path: Path) -> None:
    """Hold what doctor and the README say of a closed terminal."""
    if family() != "MPICH":
        pytest.skip("this is no mpirun of MPICH")
    first, second = tmp_path / "run", tmp_path / "second"
    process = start(2, ["-m", "minillm.train", *tiny, *ENDLESS])
    wait_for_steps(process, first)
    os.killpg(process.pid, signal.SIGHUP)
    assert finish(process).returncode == -signal.SIGHUP
    assert not (first / "checkpoints").exists()
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = start(2, ["-m", "minillm.train", *tiny, *ENDLESS, "--out", str(second)])
    finally:
        signal.signal(signal.SIGHUP, usual)
    wait_for_steps(process, second)
    os.killpg(process.pid, signal.SIGHUP)
    wait_for_steps(process, second, (second / "metrics.jsonl").read_text().count("\n") + 3)
    os.killpg(process.pid, signal.SIGINT)
    check_saved(second, finish(process).output, 2)


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
@pytest.mark.slow
def test_a_second_signal_aborts(ranks: int, tiny: list[str], tmp_path: Path) -> None:
    process = start(ranks, [PROGRAM, "hang", "0", *tiny, *ENDLESS])
    process.wait_for("hangs")
    os.killpg(process.pid, signal.SIGINT)
    process.wait_for("SIGINT: finishing this step")
    os.killpg(process.pid, signal.SIGINT)
    found = finish(process)
    assert found.output.count("SIGINT: finishing this step") == 1, found.output
    # At a second Ctrl-C mpirun ends the ranks itself. MPICH's then leaves with 255, now and then 0.
    assert ranks or found.returncode == 128 + signal.SIGINT
    assert "stopped at" not in found.output and not (tmp_path / "run" / "checkpoints").exists()


LONG = ["--eval-tokens", "1000000000", "--sample-tokens", "1000000", "--steps", "6"]


@needs_mpirun
@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (["--eval-every", "5"], "measures"),
        (["--eval-every", "0", "--eval-tokens", "1"], "writes"),
    ],
)
@pytest.mark.slow
def test_a_signal_ends_an_evaluation_and_a_sample(
    options: list[str], begins: str, tiny: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("the quick brown fox\n" * 100_000)
    process = start(2, [PROGRAM, "tell", "0", *tiny, "--data", str(text), *LONG, *options])
    process.wait_for(begins)  # after step 5, or at the end
    os.killpg(process.pid, signal.SIGINT)
    found = finish(process, 30)
    assert found.returncode == 0, found.output
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000006"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_ignored_signal_stays_ignored_and_handlers_return(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    usual = signal.getsignal(signal.SIGINT)
    try:
        with StopRequest(announces=False).listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.asked() and signal.getsignal(signal.SIGINT) is not usual
            os.kill(os.getpid(), number)
            wait_until(stop.asked)
            assert stop.signal == number.name
    finally:
        ignored = signal.signal(signal.SIGHUP, before)
    assert ignored is signal.SIG_IGN and signal.getsignal(signal.SIGINT) is usual


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_or_a_scheduler_may_ask_several_times(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signals, "abort", ended.append)
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with StopRequest(announces=False).listening() as stop:
        stop.ask("standard output is lost")
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        assert not ended
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: len(ended) == 2)
    assert ended == [128 + signal.SIGTERM] * 2


def test_a_step_that_takes_long_says_that_it_is_being_finished(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "REMINDER_SECONDS", 0.05)
    with StopRequest(announces=True).listening():
        os.kill(os.getpid(), signal.SIGTERM)
        error, reminder = "", "SIGTERM: still finishing the step or saving, for 0 min now"

        def reminded() -> bool:
            nonlocal error
            error += capfd.readouterr().err
            return error.count(reminder) >= 2

        wait_until(reminded)
    assert error.startswith("\nSIGTERM: finishing this step, then saving and stopping; once more")


def test_main_runs_in_a_thread_and_after_a_failure(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, "--steps", "2"]
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main(arguments)))
    thread.start()
    thread.join()
    bad = ["--lr", "1e30", "--warmup", "0", "--clip", "0", "--min-lr", "1e30", "--steps", "50"]
    statuses.append(main([*tiny, *bad, "--out", str(tmp_path / "bad")]))
    assert statuses == [0, 1] and gc.isenabled()
    assert main([*arguments, "--out", str(tmp_path / "third")]) == 0


@pytest.mark.parametrize(
    ("command", "handler"),
    [
        (["-m", "minillm.doctor", "--help"], signal.SIG_DFL),  # Ctrl-C ends the imports silently
        (["-c", "import minillm"], signal.default_int_handler),
    ],
)
def test_ctrl_c_during_the_imports(command: list[str], handler: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, signal; atexit.register(lambda: print(signal.getsignal(signal.SIGINT)))"
    )
    found = finish(start(0, command, {"PYTHONPATH": str(tmp_path)}))
    assert found.output.splitlines()[-1].split(" at ")[0] == str(handler).split(" at ")[0]


def test_a_reader_that_goes_is_a_request_to_stop(tiny: list[str], tmp_path: Path) -> None:
    """Read one line, as `| head -1` does."""
    command = [sys.executable, "-m", "minillm.train", *tiny, *ENDLESS]
    process = Launch(command, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("data")
    process.stdout.close()
    assert process.wait(60) == 0
    error = process.stderr.read()
    assert "standard output is lost (Broken pipe): finishing this step" in error, error
    assert list((tmp_path / "run" / "checkpoints").iterdir()) and "Traceback" not in error


def test_a_reader_of_the_help_may_go() -> None:
    read, write = os.pipe()
    os.close(read)
    program = subprocess.run(
        [sys.executable, "-m", "minillm.evaluate", "--help"],
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(write)
    assert (program.returncode, program.stderr) == (141, b"")
