"""Progress on the screen: the live line, the lines of a log, the loss that they show."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from mpi_helpers import MPIRUN, Launch, environment, needs_mpirun

from minillm.base import progress
from minillm.base.errors import ConfigError
from minillm.base.interval import Interval
from minillm.base.log import Log
from minillm.base.progress import Curve, Progress, RunningMean, resampled, sparkline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock of the display and its terminal; the list holds the time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress, "terminals", lambda: (None, None))
    return now


def steps_shown(
    capsys: pytest.CaptureFixture[str], clock: list[float], total: int, seconds: float, every: str
) -> list[int]:
    """Return the steps that have a line in a run of `total` steps of `seconds` each."""
    interval = None if every == "auto" else Interval.parse(every, "--log-every")
    shown = Progress(Log(0), 0, total, 100, every=interval)
    for step in range(total):
        clock[0] += seconds
        shown.update(step, 2.0, 1e-3, 0.5)
    return [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("total", "seconds", "every", "wanted"),
    [
        (10, 120.0, "auto", list(range(1, 11))),  # long steps: a line each
        (10, 1.0, "auto", [1, 6, 10]),  # five seconds apart
        (10, 1.0, "4", [1, 5, 9, 10]),
        (10, 1.0, "3s", [1, 4, 7, 10]),
    ],
)
def test_lines_come_at_the_interval_and_at_both_ends(
    capsys: pytest.CaptureFixture[str],
    clock: list[float],
    total: int,
    seconds: float,
    every: str,
    wanted: list[int],
) -> None:
    assert steps_shown(capsys, clock, total, seconds, every) == wanted


def test_ten_hours_make_about_a_hundred_lines(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    assert 100 <= len(steps_shown(capsys, clock, 36_000, 1.0, "auto")) <= 102


@pytest.mark.parametrize("text", ["", "s", "10x", "-3", "1.5", "5 minutes", "nan"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--log-every .* no interval; .*30s"):
        Interval.parse(text, "--log-every")


def test_intervals_are_steps_or_times() -> None:
    wanted = {"100": (100, 0), "30s": (0, 30), "1.5m": (0, 90), "2h": (0, 7200), "0": (0, 0)}
    assert {text: Interval.parse(text, "--x") for text in wanted} == wanted
    assert [Interval(10, 5).passed(*since) for since in ((10, 5), (9, 5), (10, 4))] == [
        True,
        False,
        False,
    ]


def test_a_line_has_the_smoothed_loss_and_rates_in_80_columns(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    shown = Progress(Log(0), 0, 1000, 2048, flops=11.4e9, every=Interval(1))
    for step, loss in enumerate((3.0, 1.0)):
        clock[0] += 0.5
        shown.update(step, loss, 2e-3, 0.85)
    # With Adam's correction, (0.95 * 3 + 1) / 1.95 after two steps. 11.4 GFLOP in half a second.
    assert capsys.readouterr().out.splitlines() == [
        "step    1/1000   0 %  loss 3.000  4.1k tokens/s  8:20 left  22.8 GFLOP/s",
        "step    2/1000   0 %  loss 1.974  4.1k tokens/s  8:19 left  22.8 GFLOP/s",
    ]
    shown.close()  # the last line stands there already
    assert capsys.readouterr().out == ""
    rare = Progress(Log(0), 0, 1000, 2048, every=Interval(500))
    for step in range(20):
        rare.update(step, 3.0, 2e-3, 0.85)
    rare.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "20/1000"]
    silent = Progress(Log(1), 0, 10, 100)
    silent.update(0, 2.0, 1e-3, 0.5)
    assert capsys.readouterr() == ("", "") and silent.curve.describe() == ""


def test_an_evaluation_stands_under_the_loss(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    shown = Progress(Log(0), 0, 1000, 2048)
    clock[0] += 1
    shown.update(0, 3.0, 2e-3, 0.85)
    shown.evaluated(1, "held-out loss 2.500")
    step, held_out = capsys.readouterr().out.splitlines()
    assert held_out.index("held-out") == step.index("loss")


def test_the_running_mean_forgets_at_its_rate() -> None:
    mean = RunningMean(20)
    values = [mean.add(1.0) for _ in range(100)] + [mean.add(2.0) for _ in range(20)]
    assert values[:100] == pytest.approx([1.0] * 100)
    # 20 steps after a jump the old level still weighs 0.95 ** 20.
    assert values[-1] == pytest.approx(2 - 0.95**20, abs=0.003)


def test_the_curve_keeps_means_in_bounded_memory() -> None:
    curve = Curve(most=8)
    for value in range(1000):
        curve.add(float(value))
    assert len(curve.values()) <= 8
    assert curve.values()[0] == sum(range(128)) / 128
    assert curve.values()[-1] == sum(range(896, 1000)) / 104
    assert curve.describe().startswith("0.000 ") and curve.describe().endswith(" 947.5")


@pytest.mark.parametrize(("width", "blocks"), [(200, 60), (80, 60), (60, 40)])
def test_the_curve_of_a_run_fits_one_line(
    width: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "columns", lambda: width)
    curve = Curve()
    for value in range(100):
        curve.add(12.5 - 0.1 * value)
    first, drawn, last = curve.describe().split()
    assert (first, len(drawn), last) == ("12.50", blocks, "2.600")


def test_a_sparkline_is_logarithmic_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sparkline([1.0, 2.0, 4.0, 8.0, 16.0]) == "▁▃▅▇█"
    assert len(sparkline([float(n + 1) for n in range(500)], 60)) == 60
    assert sparkline([]) == "" and sparkline([3.0]) == "▁"
    assert resampled([1.0, 2.0, 3.0, 4.0], 2) == [1.5, 3.5]
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert sparkline([1.0, 16.0]) == "_#"


def on_terminal(command: list[str], columns: int) -> list[str]:
    """Run a command on a terminal of `columns`; return what stood on its lines, redraws apart."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ends = dict(stdin=follower, stdout=follower, stderr=follower)
    process = Launch(command, preexec_fn=own_terminal, **ends)
    os.close(follower)
    found = b""
    try:
        while piece := os.read(leader, 65536):
            found += piece
    except OSError:  # EIO: the last process that held the terminal has ended
        pass
    assert process.wait(180) == 0, found.decode()
    os.close(leader)
    return found.decode().replace("\n", "\r").split("\r")


@needs_mpirun
@pytest.mark.parametrize("columns", [80, 50])
def test_under_mpirun_rank_0_draws_on_the_launchers_terminal(columns: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        # A millisecond passes at each look: a busy machine is no reason for a further line.
        "import itertools, time\n"
        "ticks = itertools.count()\n"
        "time.perf_counter = lambda: next(ticks) / 1000\n"
        "from mpi4py import MPI\n"
        "from minillm.base.log import Log\n"
        "from minillm.base.progress import Progress\n"
        "shown = Progress(Log(MPI.COMM_WORLD.Get_rank()), 0, 40, 100, flops=1e9)\n"
        "for step in range(40):\n"
        "    shown.update(step, 2.0, 1e-3, 0.5)\n"
        "shown.evaluated(40, 'held-out loss 2.5')\n"
        "shown.close()\n"
    )
    lines = on_terminal([str(MPIRUN), "-n", "2", sys.executable, str(program)], columns)
    bars = [line for line in lines if "40/40  loss 2.000" in line]
    assert bars and all("tokens/s" in line for line in bars)
    assert sum(line.startswith("eval 40/40") for line in lines) == 1
    assert max(map(len, lines)) < columns
    # Without a terminal of the launcher there are lines instead.
    plain = subprocess.run(
        [str(MPIRUN), "-n", "2", sys.executable, str(program)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,  # ends a launch that hangs
        check=True,
    )
    assert [line.split()[:2] for line in plain.stdout.splitlines()] == [
        ["step", "1/40"],
        ["step", "40/40"],
        ["eval", "40/40"],
    ]
