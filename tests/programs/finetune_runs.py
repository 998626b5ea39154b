"""Checks of fine-tuning that every task passes: on ranks as on one process, and after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mpi_helpers import finish, left_behind, mpirun_calls, start, wait_for_steps
from run_files import lines_of

from minillm import checkpoint, evaluate, finetune

FAULTY = str(Path(__file__).with_name("fault_program.py"))


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


class Parts(NamedTuple):
    """Run that was trained in parts: what the first one printed, and what was measured."""

    said: str
    steps: list[dict[str, Any]]  # lines of its metrics
    measured: dict[int, float]  # the headline metric after each step that was evaluated
    numbers: dict[str, Any]  # of `minillm.evaluate`


def check_parts(
    asked: Sequence[str],
    stops: tuple[int, int],
    metric: str,
    data: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    microbatch: tuple[int, int] | None = None,
) -> Parts:
    """Train folder/run to each of the two `stops` and to the end, and compare with a whole run.

    The losses have the same bits. With `microbatch`, the sizes in the second part and in the last,
    this holds for the first part alone, and the rest has other rounding. The best checkpoint is the
    newest of those with the best `metric`. The run held `data` out, and evaluates it as it did.
    """
    run, whole, exact = folder / "run", folder / "whole", None
    changes: list[list[str]] = [[], []]
    if microbatch:
        changes, exact = [["--microbatch", str(size)] for size in microbatch], stops[0]
    capsys.readouterr()
    assert finetune.main([*asked, "--out", str(run), "--stop-after", str(stops[0])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    again = ["--resume", str(run)]
    assert finetune.main([*again, "--stop-after", str(stops[1]), *changes[0]]) == 0
    assert finetune.main([*again, *changes[1]]) == 0
    assert finetune.main([*asked, "--out", str(whole)]) == 0
    found, expected = lines_of(run), lines_of(whole)
    assert len(found) == len(expected) > stops[1]
    for name in ("loss", "grad_norm"):
        own, wanted = ([line[name] for line in lines] for lines in (found, expected))
        assert own[:exact] == wanted[:exact]
        assert own == pytest.approx(wanted, rel=1e-3)
    value = f"val_{metric}"
    measured = {line["step"]: line[value] for line in found if value in line}
    assert {*stops, len(found)} <= measured.keys()
    best = checkpoint.find(run, True)
    assert int(best.name.split("-")[1]) == max(measured, key=lambda step: (measured[step], step))

    capsys.readouterr()
    assert evaluate.main([str(run), "--data", data, "--threads", "1"]) == 0
    (numbers,) = printed(capsys)
    assert evaluate.main([str(run), "--threads", "1"]) == 0
    assert printed(capsys) == [numbers]
    low, high = numbers[f"{metric}_95"]
    assert numbers[metric] == measured[len(found)] and low <= numbers[metric] <= high
    return Parts(said, found, measured, numbers)


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
    assert finish(process).returncode != 0 and not left_behind(run)
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
