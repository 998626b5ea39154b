"""Going on: in the folder that was named, with other options, from weights, and after a crash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun
from run_files import lines_of

from minillm import checkpoint, evaluate, train
from minillm.base.errors import ConfigError
from minillm.base.flags import to_toml
from minillm.base.lock import FolderLock
from minillm.data.batches import Batches
from minillm.inference import loading
from minillm.training import origin, trainer
from minillm.training.arguments import parse_train_args
from minillm.training.config import RunConfig
from minillm.training.folder import begin, check_visible
from minillm.training.step import StepReport
from minillm.training.trainer import Trainer

Train = Callable[..., str]

# Modules; minillm.checkpoint has functions of the same names.
find, saving = (import_module(f"minillm.checkpoint.{name}") for name in ("find", "save"))


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.fixture
def run_train(capsys: pytest.CaptureFixture[str]) -> Train:
    """Return a function that runs `minillm.train` in this process and returns what it prints."""

    def run(*words: Any, status: int = 0) -> str:
        capsys.readouterr()
        found = train.main([str(word) for word in words])
        output = "".join(capsys.readouterr())
        assert found == status, output
        return output

    return run


def steps(run: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def record(run: Path) -> checkpoint.RunRecord:
    return checkpoint.RunRecord.read(checkpoint.find(run))


# In the folder that was named


@pytest.mark.parametrize("how", ["copy", "move", "elsewhere"])
def test_a_run_goes_on_in_the_folder_that_is_named(
    how: str, tiny: list[str], tmp_path: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_train(*tiny, "--out", "first", "--stop-after", 3)
    first, named = tmp_path / "first", tmp_path / "first"
    before = contents(first)
    assert record(first).config["out"] is None
    if how == "copy":
        named = shutil.copytree(first, tmp_path / "second")
    elif how == "move":
        named = first.rename(tmp_path / "second")
    else:
        (tmp_path / "else").mkdir()
        monkeypatch.chdir(tmp_path / "else")
    output = run_train("--resume", named if how == "elsewhere" else named.name)
    assert f"output  {named if how == 'elsewhere' else 'second'}\n" in output
    assert steps(named) == [1, 2, 3, 4, 5, 6]
    assert checkpoints(named) == ["step-00000003", "step-00000006"]
    if how == "copy":
        assert contents(first) == before
    assert first.exists() == (how != "move")
    assert {path.name for path in tmp_path.iterdir()} <= {"first", "second", "else", "text.txt"}
    assert not list((tmp_path / "else").glob("*"))


@pytest.mark.slow
def test_out_makes_a_new_run_that_starts_as_a_copy(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run_train(*tiny, "--out", first, "--save-every", 2, "--keep", 9)
    before = contents(first)
    middle = first / "checkpoints" / "step-00000002"
    run_train("--resume", middle, "--out", second, "--stop-after", 5)
    assert contents(first) == before
    assert steps(second) == [1, 2, 3, 4, 5]
    assert losses(second) == losses(first)[:5]
    assert checkpoints(second)[0] == "step-00000002"
    assert contents(second / "checkpoints" / "step-00000002") == contents(middle)
    refused = run_train("--resume", first, "--out", second, "--steps", 9, status=1)
    assert f"--out {second} holds an earlier run" in refused
    run_train(*tiny, "--out", third, "--seed", 2)
    before = contents(third)
    run_train("--resume", second, "--out", third, status=1)
    assert contents(third) == before
    output = run_train("--resume", second, "--out", f"{second}/", "--stop-after", 6)
    assert steps(second) == [1, 2, 3, 4, 5, 6] and "going back" not in output


def test_a_checkpoint_outside_a_run_needs_a_folder(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    run_train(*tiny, "--stop-after", 3)
    alone = shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "mine")
    before = contents(tmp_path)
    assert "pass --out FOLDER" in run_train("--resume", alone, status=1)
    assert contents(tmp_path) == before
    run_train("--resume", alone, "--out", tmp_path / "new")
    assert steps(tmp_path / "new") == [4, 5, 6]


# One owner


@pytest.mark.slow
def test_a_folder_in_use_is_refused_or_numbered(
    tiny: list[str], tmp_path: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run_train(*tiny, "--stop-after", 3)
    before = contents(run)
    (tmp_path / "runs" / "nano").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with FolderLock(run), FolderLock(tmp_path / "other"), FolderLock(tmp_path / "runs" / "nano"):
        output = run_train("--resume", run, status=1)
        assert f"{run} is in use by another run (process " in output and "pass --out" in output
        assert "is in use" in run_train(*tiny, "--out", "other", status=1)
        assert "checkpoint" not in str(contents(run).keys() - before.keys())
        without = [word for word in tiny if word not in ("--out", str(run))]
        assert "output  runs/nano-2\n" in run_train(*without, "--stop-after", 1)
        assert "output  copy\n" in run_train("--resume", run, "--out", "copy")
        assert "output  runs/nano-3\n" in run_train(*without, "--stop-after", 1)
    assert contents(run) == before
    run_train("--resume", run)
    assert not list(tmp_path.rglob("run.lock"))


def test_a_run_that_died_before_its_first_checkpoint_gives_its_folder(
    tiny: list[str], tmp_path: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying_at(2, Trainer.step))
        with pytest.raises(Killed):
            train.main(tiny)
    assert steps(run) == [1, 2]
    output = run_train("--resume", run, status=1)
    assert f"start it again with --config {run}/config.toml --out {run}" in output
    output = run_train("--config", run / "config.toml", "--out", run, "--seed", 5)
    assert "ended before its first checkpoint; this one takes its place" in output
    assert steps(run) == [1, 2, 3, 4, 5, 6] and record(run).config["seed"] == 5


def dying_at(step: int, usual: Callable[..., StepReport]) -> Callable[..., StepReport]:
    def dying(self: Trainer, number: int) -> StepReport:
        if number == step:
            raise Killed
        return usual(self, number)

    return dying


def test_every_rank_looks_at_the_folder(tmp_path: Path) -> None:
    check_visible(tmp_path)
    with pytest.raises(ConfigError, match="choose a folder that all ranks share"):
        check_visible(tmp_path / "on another host")


# Other options


@pytest.mark.slow
def test_options_that_alter_the_result_are_announced(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    run = tmp_path / "run"
    run_train(*tiny, "--lr", 0.01, "--steps", 20, "--stop-after", 4)
    output = run_train("--resume", run, "--lr", 0.5, "--batch", 4, "--steps", 40, "--stop-after", 6)
    assert [line for line in output.splitlines() if "changed" in line] == [
        "changed from step 5 on: --batch 4 (was 8)",
        "changed from step 5 on: --steps 40 (was 20)",
        "changed from step 5 on: --lr 0.5 (was 0.01)",
        "changed from step 5 on: --min-lr 0.05 (was 0.001), which follows from the other options",
        "changed from step 5 on: --warmup 4 (was 2), which follows from the other options",
    ]
    saved = record(run)
    assert (saved.position, saved.config["lr"], saved.config["min_lr"]) == (40, 0.5, None)
    assert "changed" not in run_train("--resume", run, "--stop-after", 7)
    assert record(run).position == 44
    rates = [line["lr"] for line in lines_of(run)]
    assert rates[4] == pytest.approx(0.5) and rates[3] < 0.01


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    constant = [*tiny, "--lr-schedule", "constant", "--warmup", 0]
    run_train(*constant, "--out", whole, "--steps", 9)
    run_train(*constant, "--out", longer)
    before = contents(longer)
    output = run_train("--resume", longer)
    assert output.count("\n") == 1 and "nothing is left to do for --steps 6" in output
    assert f"--resume {longer} --steps 12" in output
    output = run_train("--resume", longer, "--steps", 9, "--stop-after", 2)
    assert "nothing is left to do for --stop-after 2" in output
    assert f"--resume {longer} --stop-after 12" in output
    assert contents(longer) == before
    assert "changed from step 7 on: --steps 9 (was 6)" in run_train(
        "--resume", longer, "--steps", 9
    )
    assert losses(longer) == losses(whole)


def test_the_position_in_the_text_counts_sequences() -> None:
    tokens = np.arange(1000)
    eights, fours = Batches(tokens, 16, 8, seed=3), Batches(tokens, 16, 4, seed=3, first=20)
    assert fours.position(5) == eights.position(5) == 40
    numbers = [int(eights.starts(step, [row])[0]) for step in (5, 6) for row in range(8)]
    found = [int(fours.starts(step, [row])[0]) for step in range(5, 9) for row in range(4)]
    assert found == numbers


@pytest.mark.slow
def test_the_same_text_elsewhere_is_recognised_and_another_one_announced(
    tiny: list[str],
    text: Path,
    tmp_path: Path,
    run_train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, moved, other = tmp_path / "run", tmp_path / "moved.txt", tmp_path / "other.txt"
    monkeypatch.chdir(tmp_path)
    run_train(*tiny, "--data", text.name, "--stop-after", 2)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    run_train("--resume", run, "--stop-after", 3)  # a relative path, from another folder
    text.rename(moved)
    assert "text.txt" in run_train("--resume", run, status=1)
    output = run_train("--resume", run, "--data", "../moved.txt", "--stop-after", 4)
    assert f"holds the text that was {text}" in output and "changed" not in output
    assert record(run).position == 32
    other.write_text(moved.read_text()[::-1])
    output = run_train("--resume", run, "--data", other, "--stop-after", 5)
    assert f"changed from step 5 on: --data {other} from its beginning (was ../moved.txt)" in output
    assert record(run).position == 8
    other.write_text("another text\n" * 500)
    before = contents(run)
    output = run_train("--resume", run, status=1)
    assert "now has" in output and "--init-from" in output
    assert contents(run) == before


@pytest.mark.slow
def test_the_advice_after_a_divergence_works(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    run = tmp_path / "run"
    wild = ["--lr", 1e30, "--clip", 0, "--warmup", 0, "--sample-tokens", 0]
    output = run_train(*tiny, *wild, status=1)
    assert "error: step 2: " in output and "start again with such a change" in output
    run_train(*tiny, "--stop-after", 3)
    output = run_train("--resume", run, *wild, "--save-every", 1, status=1)
    assert "error: step 5: " in output and "try a smaller --lr (now 1e+30)" in output
    assert "or a --clip 1." in output
    assert checkpoints(run) == ["left-step-00000004", "step-00000003"]
    back = output.split("as in: --resume ")[1].split()[0]
    output = run_train("--resume", back, "--lr", 1e-3, "--clip", 1)
    assert "--lr 0.001 (was " in output
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_printed_configuration_leaves_to_a_gpu_what_its_memory_decides(run_train: Train) -> None:
    large = ("--print-config", "--dim", 256, "--batch", 256)
    assert '# recompute = "selective"\n' in run_train(*large)
    assert '# recompute = "auto"\n' in run_train(*large, "--device", "cuda")


@pytest.mark.slow
def test_a_configuration_and_a_run_to_resume_go_together(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    run, file = tmp_path / "run", tmp_path / "more.toml"
    run_train(*tiny, "--lr", 0.005)
    before = contents(run)
    printed = run_train("--resume", run, "--steps", 9, "--print-config")
    assert "steps = 9\n" in printed and "\nout = " not in printed
    assert contents(run) == before and "\nout = " not in (run / "config.toml").read_text()
    file.write_text("steps = 8\nlr = 0.01\n")
    output = run_train("--resume", run, "--config", file, "--lr", 0.02)
    assert "--steps 8 (was 6)" in output and "--lr 0.02 (was 0.005)" in output
    assert "warmup" not in output and steps(run) == list(range(1, 9))
    file.write_text("dim = 32\n")
    assert "--dim 32 (was 16)" in run_train("--resume", run, "--config", file, status=1)
    output = run_train("--resume", run, "--config", run / "config.toml", "--steps", 9)
    assert f"output  {run}\n" in output and "--steps 9 (was 8)" in output
    with pytest.raises(ConfigError, match="begins with initial weights"):
        parse_train_args(["--resume", str(run)])


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    config = RunConfig().replace(data=os.fsdecode(b"/caf\xe9.txt"))
    begin(tmp_path, to_toml(config), None)
    assert b"caf\xe9.txt" in (tmp_path / "config.toml").read_bytes()
    assert parse_train_args(["--config", str(tmp_path / "config.toml")])[1] == config


# From weights


def test_a_run_starts_from_weights_alone(
    tiny: list[str], text: Path, tmp_path: Path, run_train: Train
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    long = ["--position", "rotary", "--eval-every", 2, "--save-every", 1, "--keep", 9]
    run_train(*tiny, *long, "--out", first, "--tokenizer", "char")
    held_out = {
        step: checkpoint.RunRecord.read(path).held_out
        for step, path in checkpoint.run_steps(first).items()
    }
    assert {step for step, value in held_out.items() if value} == {2, 4, 6}
    before = contents(first)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    options = ["--data", other, "--lr", 1e-9, "--steps", 1, "--context", 40, "--sample-tokens", 0]
    output = run_train("--init-from", first, "--best", *options, "--out", second)
    best = min((2, 4, 6), key=lambda step: held_out[step]["loss"])
    assert f"weights from {first}/checkpoints/step-{best:08d}, trained on {text}" in output
    assert contents(first) == before and steps(second) == [1]
    saved = record(second)
    assert (saved.config["context"], saved.config["seed"], saved.position) == (40, 1337, 16)
    arrays = [
        checkpoint.CheckpointSource(path).read(
            "model/embedding.weight", (slice(0, 9), slice(0, 16))
        )
        for path in (first / "checkpoints" / f"step-{best:08d}", checkpoint.find(second))
    ]
    np.testing.assert_allclose(arrays[0], arrays[1], atol=1e-8)


def test_learned_positions_can_be_cut_and_not_extended(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    run_train(*tiny, "--position", "learned")
    init = ["--init-from", tmp_path / "run", "--out", tmp_path / "new", "--steps", 1]
    output = run_train(*init, "--context", 32, status=1)
    assert "--context 32 is longer than the 16 positions" in output and "rotary" in output
    run_train(*init, "--context", 8, "--lr", 1e-9, "--sample-tokens", 0)
    old, new = (
        checkpoint.CheckpointSource(checkpoint.find(tmp_path / name)) for name in ("run", "new")
    )
    whole = (slice(0, 8), slice(0, 16))
    assert new.shape("model/positions") == (8, 16)
    np.testing.assert_allclose(
        new.read("model/positions", whole), old.read("model/positions", whole), atol=1e-8
    )


# One true story


def test_going_back_is_written_down_before_the_first_step(
    tiny: list[str], tmp_path: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run_train(*tiny, "--save-every", 2, "--keep", 9)
    course = losses(run)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying_at(2, Trainer.step))
        with pytest.raises(Killed):
            train.main(["--resume", str(run / "checkpoints" / "step-00000002")])
    assert checkpoints(run) == ["left-step-00000004", "left-step-00000006", "step-00000002"]
    assert steps(run) == [1, 2] and steps(run, "left-metrics.jsonl") == [3, 4, 5, 6]
    output = run_train("--resume", run)
    assert "at step 2\n" in output and "going back" not in output
    assert losses(run) == course


def test_a_rewind_that_dies_half_way_leads_back_to_no_hole(
    tiny: list[str], tmp_path: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run_train(*tiny, "--save-every", 2, "--keep", 9)
    course, usual = losses(run), Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "step-00000004":
            raise Killed
        return usual(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            train.main(["--resume", str(run / "checkpoints" / "step-00000002")])
    assert "at step 4\n" in run_train("--resume", run)
    assert losses(run) == course


def test_the_line_of_a_saved_step_is_written_before_its_checkpoint(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, usual, seen = tmp_path / "run", saving._complete, []

    def complete(*args: Any) -> None:
        seen.append((args[-1], steps(run)))
        usual(*args)

    monkeypatch.setattr(saving, "_complete", complete)
    assert train.main([*tiny, "--save-every", "1"]) == 0
    assert seen == [(step, list(range(1, step + 1))) for step in range(1, 7)]


def test_missing_and_odd_metrics_never_stop_a_resume(
    tiny: list[str], tmp_path: Path, run_train: Train
) -> None:
    run = tmp_path / "run"
    run_train(*tiny, "--stop-after", 2)
    (run / "metrics.jsonl").unlink()
    run_train("--resume", run, "--stop-after", 3)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'12\n{"step": null}\n\xff\n')
    run_train("--resume", run, "--stop-after", 4)
    assert steps(run) == [3, 4]


def test_the_best_checkpoint_is_kept_and_evaluated(
    tiny: list[str], tmp_path: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    bad = ["--lr", 3.0, "--warmup", 2, "--clip", 0, "--eval-every", 1, "--save-every", 1]
    run_train(*tiny, *bad, "--steps", 8, "--keep", 1)
    lines = lines_of(run)
    best = min(lines, key=lambda line: line["val_loss"])
    assert best["step"] < 8
    assert checkpoints(run) == [f"step-{best['step']:08d}", "step-00000008"]
    for words, expected in ([], lines[-1]), (["--best"], best):
        capsys.readouterr()
        assert evaluate.main(["--checkpoint", str(run), "--tokens", "64", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    run_train("--resume", run, "--steps", 10, "--no-keep-best")
    assert checkpoints(run) == ["step-00000010"]


class Pruning:
    """Removal of the checkpoints of `run` while another program reads them."""

    def __init__(self, run: Path) -> None:
        self.run, self.removed = run, list[int]()

    def before(self, usual: Callable[..., Any], step: int) -> Callable[..., Any]:
        """Return `usual`, which first removes the checkpoint of `step`."""

        def pruning(*args: Any, **options: Any) -> Any:
            path = self.run / "checkpoints" / f"step-{step:08d}"
            if path.exists():
                self.removed.append(step)
                shutil.rmtree(path)
            return usual(*args, **options)

        return pruning


def test_a_reader_finds_the_newest_while_the_run_prunes(
    tiny: list[str],
    tmp_path: Path,
    run_train: Train,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    run_train(*tiny, "--save-every", 1, "--keep", 9)
    pruning = Pruning(run)
    # The newest goes away while it is looked at, verified, read and loaded.
    for place, name, step in (
        (find, "check_sizes", 6),
        (loading.checkpoint, "verify", 5),
        (loading.checkpoint, "check_shapes", 4),
        (loading.checkpoint, "load", 3),
    ):
        monkeypatch.setattr(place, name, pruning.before(getattr(place, name), step))
    assert evaluate.main(["--checkpoint", str(run), "--tokens", "64"]) == 0
    assert pruning.removed == [6, 5, 4, 3] and "loss" in capsys.readouterr().out


def test_a_run_starts_from_weights_while_their_run_prunes(
    tiny: list[str],
    tmp_path: Path,
    run_train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    run_train(*tiny, "--save-every", 1, "--keep", 9)
    pruning = Pruning(run)
    # The newest goes away while the options are read, the manifest, the text, and the weights.
    for place, name, step in (
        (checkpoint.RunRecord, "read", 6),
        (origin.checkpoint, "read_manifest", 5),
        (train, "resolve", 4),
        (trainer, "load", 3),
    ):
        monkeypatch.setattr(place, name, pruning.before(getattr(place, name), step))
    output = run_train("--init-from", run, "--out", new, "--steps", 1, "--sample-tokens", 0)
    assert pruning.removed == [6, 5, 4, 3] and steps(new) == [1]
    assert f"weights from {run}/checkpoints/step-00000002, trained on" in output


@needs_mpirun
@pytest.mark.slow
def test_ranks_agree_on_the_time_to_save(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = ["--save-every", "0.001s", "--keep", "99"]
    found = mpirun(2, ["-m", "minillm.train", *tiny, *often, "--steps", "12", "--pp", "2"])
    assert found.returncode == 0, found.output
    assert len(checkpoints(run)) >= 3
    (run / "run.lock").write_text("left by a crash")
    again = mpirun(2, ["-m", "minillm.train", "--resume", str(run), "--steps", "14"])
    assert again.returncode == 0 and steps(run) == list(range(1, 15)), again.output
