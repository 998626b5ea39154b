"""Preparation of a text under mpirun, and a second start that maps its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi_helpers import mpirun, needs_mpirun

from minillm.data import prepare, sources


@needs_mpirun
@pytest.mark.slow
def test_tokens_are_prepared_once_and_mapped(text: Path, tmp_path: Path) -> None:
    data = ["--data", str(text), "--tokenizer", "char", "--cache", str(tmp_path / "cache")]
    prepared = mpirun(2, ["-m", "minillm.data.prepare", *data])
    assert prepared.returncode == 0, prepared.output
    assert f"train with: python -m minillm.train {' '.join(data)}" in prepared.output
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    facts = json.loads((entry / "entry.json").read_text())
    assert facts["sizes"]["train"] + facts["sizes"]["held_out"] == len(text.read_text())
    before = (entry / "train").stat().st_mtime_ns
    again = mpirun(2, ["-m", "minillm.data.prepare", *data, "--val-data", str(text)])
    assert again.returncode == 0, again.output
    assert (entry / "train").stat().st_mtime_ns == before


def test_the_data_are_named_whatever_a_preset_has(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "stdlib_files", lambda: (text,))
    assert prepare.main(["--cache", str(tmp_path)]) == 0
    wanted = f"ready   train with: python -m minillm.train --data stdlib --cache {tmp_path}"
    assert capsys.readouterr().out.splitlines()[-1] == wanted
