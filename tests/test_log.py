"""Progress lines, and metrics that survive an interruption."""

import json
from pathlib import Path

import pytest

from minillm.base.log import Log, MetricsFile, Progress, clock, compact


def test_numbers_and_times_read_well() -> None:
    assert [compact(number) for number in (7, 999.4, 12345, 1234567, 2.5e9)] == [
        "7",
        "999",
        "12.3k",
        "1.23M",
        "2.5G",
    ]
    assert [clock(seconds) for seconds in (0, 5.4, 75, 3661)] == ["0:00", "0:05", "1:15", "1:01:01"]


def test_progress_speaks_at_the_first_and_last_step_from_one_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in (0, 1):
        progress = Progress(Log(rank), 0, 3, 100)
        for step in range(3):
            progress.update(step, 2.123456789, 1e-3, 0.5)
        progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert all("loss 2.1234568" in line and "tokens/s" in line and "left" in line for line in lines)


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.write(step=step, loss=1.0)
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # cut off by a crash
    again = MetricsFile(path, 2)
    again.write(step=3, loss=2.0)
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0},
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
