"""Checkpoints written by earlier versions load, and the run continues as it would have then.

`saved_by_e77a9ad` was written by commit e77a9ad on two tensor-parallel ranks:
`mpirun -n 2 python -m minillm.train --layers 2 --heads 2 --dim 16 --context 16 --batch 4 --steps 6
--data austen --warmup 1 --tp 2 --stop-after 3 --eval-every 0 --eval-tokens 0 --sample-tokens 0`.
The expected numbers are those that the same commit printed when it went on from there on one rank.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_files import lines_of

from minillm import evaluate, generate, train
from minillm.checkpoint import RunRecord
from minillm.training.origin import asked

SAVED = Path(__file__).parent / "saved_by_e77a9ad"
LOSSES = [5.455289848148823, 5.417181082069874, 5.398521587252617]
NORMS = [1.5030067657543944, 1.2119538857333276, 1.2729644947777903]
HELD_OUT = 5.454725401878357


def test_a_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/old")
    shutil.copytree(SAVED, run / "checkpoints")
    assert train.main(["--resume", str(run), "--tp", "1"]) == 0
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [4, 5, 6]
    np.testing.assert_allclose([line["loss"] for line in lines], LOSSES, rtol=1e-6)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], NORMS, rtol=1e-5)
    assert "mesh dp 1 x tp 1 x pp 1 (was dp 1 x tp 2 x pp 1)" in capsys.readouterr().out


def test_its_derived_values_follow_a_change() -> None:
    options = asked(RunRecord.read(SAVED / "step-00000003"))
    # lr / 10 and the default of save_every were derived; a tenth of 6 steps is no warm-up of 1.
    found = {name: options[name] for name in ("min_lr", "save_every", "warmup", "out")}
    assert found == {"min_lr": None, "save_every": None, "warmup": 1, "out": None}


def test_programs_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(SAVED / "step-00000003")
    assert evaluate.main(["--checkpoint", checkpoint, "--tokens", "500"]) == 0
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["loss"], HELD_OUT, rtol=1e-6)
    assert generate.main(["--checkpoint", checkpoint, "--prompt", "The", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The")
