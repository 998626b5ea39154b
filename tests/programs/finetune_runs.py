"""Checks of fine-tuning that every task passes: on ranks as on one process, and after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mpi_helpers import finish, left_behind, mpirun_calls, start, wait_for_steps

from minillm import finetune

FAULTY = str(Path(__file__).with_name("fault_program.py"))


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def printed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """Return the JSON lines on standard output."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check_refused(
    asked: Sequence[str],
    train: Path,
    content: str | bytes,
    words: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Write a bad file, ask for training on it, and find one error with its name and `words`.

    Nothing is written.
    """
    run = train.with_name("run")
    train.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = [*asked, "--tokenizer", "byte", "--no-truncate", "--train", str(train)]
    assert finetune.main([*asked, "--out", str(run)]) != 0
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert all(word in error for word in [train.name, *words]), error
    assert not run.exists()


def held_out(line: dict[str, Any]) -> dict[str, float]:
    """Return the held-out numbers of a line of the metrics."""
    return {name: value for name, value in line.items() if name.startswith("val_")}


def check_ranks(
    asked: Sequence[str], going_on: Sequence[str], data: str, number: int, folder: Path
) -> None:
    """Train 6 steps on two ranks, go on with the flags `going_on`, and compare with one process.

    Losses and held-out metrics are compared, and the `number` predictions and the metrics for
    `data`.
    """
    run, whole = str(folder / "run"), str(folder / "whole")
    read = [run, "--threads", "1"]
    calls = [
        ["minillm.inference.predict", *read, "--input", data],
        ["minillm.evaluate", *read, "--data", data],
    ]
    trained = [
        ["minillm.finetune", *asked, "--out", run, "--stop-after", "6"],
        ["minillm.finetune", "--resume", run, *going_on],
    ]
    *both, predictions, numbers = mpirun_calls(2, [*trained, *calls])
    alone, *same = mpirun_calls(0, [["minillm.finetune", *asked, "--out", whole], *calls])
    assert all(found.returncode == 0 for found in (*both, alone)), both
    for found, expected in zip(lines_of(Path(run)), lines_of(Path(whole)), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert held_out(found) == pytest.approx(held_out(expected), rel=1e-10)
    lines = [line for line in predictions.output.splitlines() if line.startswith("{")]
    assert len(lines) == number and lines == [
        line for line in same[0].output.splitlines() if line.startswith("{")
    ]
    found, expected = (json.loads(x.output[x.output.index("{") :]) for x in (numbers, same[1]))
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-10)
    assert found == expected


def check_kill(task: str, words: Sequence[str], folder: Path) -> int:
    """Kill a rank in step 4, resume after step 2, and compare all steps with a whole run.

    `words` are flags of the task without its name, the first of them --preset and its value.
    Returns the number of steps.
    """
    run, whole = folder / "run", folder / "whole"
    words = [*words, "--eval-every", "2", "--save-every", "2"]
    process = start(2, [FAULTY, "kill", "1", *words, "--out", str(run)])
    wait_for_steps(process, run)
    assert finish(process, timeout=10).returncode != 0 and not left_behind(run)
    assert len(lines_of(run)) == 3
    again = [["minillm.finetune", "--resume", str(run)]]
    again += [["minillm.finetune", "--task", task, *words[2:], "--out", str(whole)]]
    assert all(found.returncode == 0 for found in mpirun_calls(2, again))
    found, expected = lines_of(run), lines_of(whole)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    assert any(map(held_out, expected))
    assert list(map(held_out, found)) == list(map(held_out, expected))
    return len(found)
