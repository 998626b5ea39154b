"""Curves of runs: the drawing in the terminal, the file, and runs that are not whole."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from minillm.__main__ import main
from minillm.base.errors import ConfigError
from minillm.training.plot import Curve, chart, read_metrics


def write_run(folder: Path, losses: list[float], **more: float) -> Path:
    """Write the metrics of a run with a step for each of `losses`, and an evaluation at the end."""
    folder.mkdir()
    lines = [
        {"step": step + 1, "loss": loss, "tokens": 1000, "seconds": 0.5, "lr": 0.1}
        for step, loss in enumerate(losses)
    ]
    lines[-1] |= more
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_chart_puts_each_point_at_its_step_and_value() -> None:
    line = Curve("loss", "*", [(step, float(step)) for step in range(1, 6)])
    low = Curve("other", "o", [(5, 1.0)])
    found = chart([line, low], width=21, height=5)
    # Logarithmic, since 5 / 1 is above 3: the rows are at 5 ** (1, 3/4, 1/2, 1/4, 0).
    assert found == [
        "   5.000 |         *",
        "         |    * *",
        "   2.236 |  *",
        "         |",
        "   1.000 |*        o",
        "         +----------",
        "          step 1   5",
    ]
    flat = chart([Curve("lr", "*", [(1, 2.0), (9, 2.0)])], width=21, height=4)
    assert sum(row.count("*") for row in flat) == 2
    linear = chart([Curve("x", "*", [(0, -1.0), (1, 0.0), (2, 1.0)])], width=21, height=3)
    assert [row.split("|")[0].strip() for row in linear[:3]] == ["1.000", "0.000", "-1.000"]


def test_runs_are_compared_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", [4.0, 2.0], val_loss=2.5)
    two = write_run(tmp_path / "two", [4.0, 3.0, 1.0])
    assert main(["plot", str(one), str(two)]) == 0
    text = capsys.readouterr().out
    assert f"a loss of {one}, b loss of {two}" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(str(tmp_path))]
    assert rows == [
        [str(one), "2", "3.000", "2.500", "(2)", "2k", "0:01"],
        [str(two), "3", "2.667", "-", "2k", "0:02"],
    ]
    assert main(["plot", str(one)]) == 0
    assert "o held-out loss" in capsys.readouterr().out
    assert main(["plot", str(one), "--key", "lr"]) == 0
    assert "0.1000" in capsys.readouterr().out


def test_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, 2.0])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"step": null}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 3, "lo')
    assert [line["loss"] for line in read_metrics(run)] == [3.0, 2.0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name the folder of a run first"),
        (["gone"], "gone holds no metrics.jsonl"),
        (["run", "--key", "los"], "no number los; --key can be loss, lr, seconds, tokens"),
        (["run", "--file", "a.bmp"], "--file a.bmp must end in one of .svg, .png, .pdf"),
        (["run", "--rows", "1"], "--rows 1 must be at least 4"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    argv: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "run", [3.0, math.nan])
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *argv]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_file_is_drawn_with_matplotlib_or_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = write_run(tmp_path / "run", [4.0, 1.0], val_loss=1.5), tmp_path / "curve.svg"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["plot", str(run), "--file", str(target)]) == 1
        assert "pip install 'minillm-mpi[plot]'" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main(["plot", str(run), "--file", str(target)]) == 0
    assert "<svg" in target.read_text(encoding="utf-8")
    assert main(["plot", str(run), "--file", str(tmp_path / "gone" / "curve.svg")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_integers_beyond_floats_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [4.0, 3.0, 2.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1' + "0" * 400 + "}\n")
    assert main(["plot", str(run)]) == 0
    assert "4.000" in capsys.readouterr().out


def test_an_empty_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no step yet"):
        read_metrics(tmp_path)
