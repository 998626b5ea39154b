"""`minillm` command: the program that it starts, and its message when there is none."""

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from minillm import __version__
from minillm.__main__ import PROGRAMS, main


def test_it_starts_the_program_with_the_rest_of_the_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []
    fake = types.ModuleType("minillm.train")
    fake.main = lambda argv: seen.append(argv) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minillm.train", fake)
    assert main(["train", "--steps", "3"]) == 5
    assert seen == [["--steps", "3"]]


def test_unknown_programs_are_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "minillm: unknown program: 'trian'; did you mean train?\n"


def test_a_value_with_line_ends_is_quoted_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "1f1b", "--ranks", "two\nlines\x1b[0m"]) == 1
    assert capsys.readouterr().err == "error: --ranks two\\nlines\\x1b[0m must be of type int\n"
    assert main(["tr\nain"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(
        any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines)
        for name in PROGRAMS
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minillm {__version__}\n"
    assert main([]) == 2


def test_it_starts_above_a_clone_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "minillm").mkdir()  # Python takes a folder without __init__.py for a package
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "schedule", "1f1b", "--ranks", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "bubble" in done.stdout, done
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == f"minillm {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "supervise", "--help"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0 and b"--elastic" in done.stdout, done


RUN = {"loss": 2.0, "seconds": 0.1, "tokens": 100, "tokens_per_second": 1e3, "lr": 0.1}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["schedule", "1f1b"],
        ["plot", "RUN"],
        ["completion", "--help"],
        ["train", "--print-config"],
        *([name, "--help"] for name in PROGRAMS),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("through", ["minillm", "python -m"])
def test_output_to_a_full_disk_is_one_line_of_error(
    words: Sequence[str],
    through: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RUN | {"step": 1}))
    words = [str(tmp_path) if word == "RUN" else word for word in words]
    start = main
    if through == "python -m":
        if words[0] not in PROGRAMS or words[0] == "emulator":
            pytest.skip("a program of the command alone")
        start, words = importlib.import_module(PROGRAMS[words[0]].module).main, words[1:]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        try:
            status = start(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    error = "error: standard output cannot be written: No space left on device\n"
    assert (status, capsys.readouterr().err) == (1, error)


def test_a_process_with_a_full_disk_ends_with_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minillm.schedule", "1f1b"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    error = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, error)
