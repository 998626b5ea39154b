"""A family is one file: two towers, registered here, go through every program with own flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.two_towers import FAMILY, OBJECTIVE, Config, PointOptions, TowerOptions
from mpi_helpers import mpirun, needs_mpirun

import minillm
from minillm import evaluate, generate, train, verify
from minillm.base.errors import ConfigError
from minillm.models import family as families
from minillm.tasks import objectives
from minillm.training.arguments import parse_train_args
from minillm.training.config import RunConfig, check_weights
from minillm.training.resolve import resolve

PROGRAM = str(Path(__file__).parent / "towers_program.py")
SMALL = ["--model", "two-towers", "--features", "3", "--layers", "2", "--batch", "8"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families._registered, FAMILY.name, FAMILY)
    monkeypatch.setitem(objectives._registered, OBJECTIVE.name, OBJECTIVE)


def parse(*argv: str, **more: Any) -> RunConfig:
    return parse_train_args(argv, **more)[1]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# Options


def test_the_model_decides_which_flags_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    found = parse("--model", "two-towers", "--features", "3", "--points-seed", "5", "--lr", "0.5")
    assert found.shape == TowerOptions(features=3) and found.corpus == PointOptions(points_seed=5)
    assert (found.model, found.preset, found.optimization.lr) == ("two-towers", "towers", 0.5)
    assert found.optimization.steps == 20  # of the preset
    assert isinstance(found, RunConfig) and RunConfig.from_dict(found.to_dict()) == found
    with pytest.raises(SystemExit):
        parse("--model", "two-towers", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--features INT" in text and "--heads" not in text and "--tokenizer" not in text
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--heads INT" in text and "--features" not in text
    assert "or two-towers" in text and "towers or wide-towers" in text


def test_a_preset_and_a_file_name_the_model(tmp_path: Path) -> None:
    assert parse("--preset", "wide-towers").shape == TowerOptions(hidden=64)
    file = tmp_path / "run.toml"
    for table in ("", "[model]\n"):
        file.write_text(f'{table}model = "two-towers"\nfeatures = 2\n')
        assert parse("--config", str(file)).shape == TowerOptions(features=2)
    file.write_text('preset = "wide-towers"\n[data]\npoints_seed = 4\n')
    found = parse("--config", str(file), "--preset", "towers")
    assert (found.shape, found.corpus) == (TowerOptions(), PointOptions(points_seed=4))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "two-tower"], "unknown model: 'two-tower'; did you mean two-towers"),
        (["--model", "zzz"], "unknown model: 'zzz'; choose one of gpt"),
        (["--features", "3"], "is an option of --model two-towers, not of --model gpt"),
        ([*SMALL, "--heads", "2"], "is an option of --model gpt.*, not of --model two"),
        ([*SMALL, "--no-bias"], "--no-bias.*: is an option of --model gpt"),
        ([*SMALL, "--preset", "nano"], "--preset nano is of --model gpt, not two-towers"),
        (["--model", "gpt", "--preset", "towers"], "--preset towers is of --model two-towers"),
        ([*SMALL, "--feature", "3"], "'--feature'; did you mean --features"),
    ],
)  # fmt: skip
def test_wrong_flags_name_the_model_that_has_them(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(*argv)


def test_files_are_refused_like_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for text, words in (
        ("features = 3", "features = 3 in .*run.toml: is an option of --model two-towers"),
        ("model = 3", "model = 3 in .*run.toml must be of type str"),
        ('model = "gptt"', "'gptt'; did you mean gpt"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            parse("--config", str(file))


def test_a_checkpoint_holds_the_model() -> None:
    saved = resolve(parse(*SMALL), 1, 0).saved_values()
    assert saved["model"] == "two-towers"
    more: dict[str, Any] = {"saved": lambda start: saved}
    assert parse("--resume", "x", **more).shape == TowerOptions(features=3, layers=2)
    assert parse("--init-from", "x", "--context", "9", **more).shape.context == 9
    for argv, words in (
        (["--resume", "x", "--model", "gpt"], "x holds a model of --model two-towers, but"),
        (["--init-from", "x", "--preset", "nano"], "--model two-towers, but --preset nano"),
        (["--resume", "x", "--features", "4"], r"--features 4 \(was 3\)"),
        (["--init-from", "x", "--hidden", "4"], r"--hidden 4 \(was 16\)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            parse(*argv, **more)
    del (old := RunConfig().to_dict())["model"]  # a checkpoint of an earlier version
    assert parse("--resume", "x", saved=lambda start: old).model == "gpt"
    check_weights(old, RunConfig())


def test_sizes_go_through_the_family() -> None:
    config = parse(*SMALL, "--tp", "3", "--hidden", "16")
    with pytest.raises(ConfigError, match="--hidden 16 does not divide over --tp 3"):
        resolve(config, 3, 0)
    found = resolve(parse(*SMALL), 1, 0)
    assert found.model == Config(features=3, layers=2) and found.filled().shape.layers == 2


# Programs


def test_every_program_takes_the_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "--steps", "4", "--eval-every", "2"]
    assert train.main([*words, "--out", "whole"]) == 0
    said = capsys.readouterr().out
    assert "towers: 2 blocks of width 16" in said and "within a half" in said
    assert "next    python -m minillm.evaluate --checkpoint whole" in said
    assert train.main([*words, "--out", "cut", "--stop-after", "2"]) == 0
    assert train.main(["--resume", "cut", "--stop-after", "4"]) == 0
    assert losses(Path("cut")) == losses(Path("whole"))
    capsys.readouterr()
    found = []
    for argv in (["cut"], ["whole"], ["whole", "--other-seed", "3"]):
        assert evaluate.main(argv) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] != found[2] and found[0]["counted"] > 0
    for argv, line in (
        ([*words, "--init-from", "whole", "--out", "new", "--points-seed", "2"], "weights from"),
        (["--resume", "whole", "--steps", "6", "--eval-every", "0"], "resumed from"),
    ):
        assert train.main(argv) == 0 and line in capsys.readouterr().out
    assert generate.main(["whole", "--prompt", "a"]) == 1
    assert "a model of --model two-towers does not continue text" in capsys.readouterr().err
    assert evaluate.main(["whole", "--data", "austen"]) == 1
    assert "--data" in capsys.readouterr().err
    assert train.main([*words, "--print-config"]) == 0
    assert '# model = "two-towers"' in capsys.readouterr().out
    assert verify.main([*SMALL, "--compare-steps", "1", "--microbatch", "2"]) == 0


def test_the_python_interface_takes_the_family() -> None:
    config = minillm.Config(model="two-towers", features=3, steps=2)
    trainer = minillm.Trainer(config)
    assert len(trainer.train()) == 2 and trainer.evaluate()["counted"] > 0
    with pytest.raises(ConfigError, match="--model two-towers does not continue text"):
        trainer.model.generate("a")


@needs_mpirun
@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    words = [*SMALL, "--steps", "4", "--dtype", "float64"]
    found = []
    for number, layout in enumerate(([], ["--pp", "2"], ["--tp", "2"], ["--dp", "2"])):
        out = tmp_path / str(number)
        done = mpirun(1 + bool(layout), [PROGRAM, "train", *words, *layout, "--out", str(out)])
        assert done.returncode == 0, done.output
        found.append(losses(out))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-10)
    done = mpirun(2, [PROGRAM, "evaluate", str(tmp_path / "1"), "--pp", "2"])
    assert done.returncode == 0 and '"hits"' in done.output
