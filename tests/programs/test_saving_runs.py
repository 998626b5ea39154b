"""Runs that save behind their steps, and runs in folders of file systems without rename."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from mpi_helpers import finish, left_behind, mpirun, needs_mpirun, start, wait_for_steps
from odd_file_systems import FileSystem, names
from run_files import lines_of

from minillm import checkpoint, train
from minillm.training.step import StepReport
from minillm.training.trainer import Trainer

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
TRAIN = ["-m", "minillm.train"]
saving = import_module("minillm.checkpoint.save")  # minillm.checkpoint has a function of that name


def curve(run: Path) -> list[Any]:
    return [(line["step"], line["loss"], line.get("val_loss")) for line in lines_of(run)]


def weights(run: Path) -> dict[str, bytes]:
    """Return the contents of all files of weights of a run, by checkpoint and name."""
    files = (run / "checkpoints").rglob("*.safetensors")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_a_run_that_saves_behind_tells_the_same_story(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once, behind = tmp_path / "at once", tmp_path / "behind"
    for run, words, how in ((at_once, [], ""), (behind, ["--save-async"], ", written behind")):
        options = ["--out", str(run), "--save-every", "2", "--keep", "9", *words]
        assert train.main([*tiny, *options]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"saving 3 checkpoints{how}; steps waited " in printed
        waited = [line["step"] for line in lines_of(run) if line.get("saving_seconds", 0) > 0]
        assert {3, 5} <= set(waited) and 1 not in waited and 2 not in waited
    assert curve(behind) == curve(at_once)
    assert list(checkpoint.run_steps(behind)) == [2, 4, 6]
    assert len(weights(behind)) == 3 and weights(behind) == weights(at_once)


def gated(patch: pytest.MonkeyPatch, step: int, seen: Callable[[], object] = lambda: None) -> None:
    """Hold files of checkpoints back until training has done `step` steps, and call `seen` then."""
    gate, write, usual = threading.Event(), saving.write_safetensors, Trainer.step

    def held(path: Path, blocks: Any) -> Any:
        assert gate.wait(60), "training waited for the checkpoint"
        return write(path, blocks)

    def stepping(self: Trainer, number: int) -> StepReport:
        report = usual(self, number)
        if number == step - 1:
            seen()
            gate.set()
        return report

    patch.setattr(saving, "write_safetensors", held)
    patch.setattr(Trainer, "step", stepping)


def test_steps_go_on_while_a_checkpoint_is_written(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hold the first checkpoint back until the next one is due, and the last to the end."""
    run, found = tmp_path / "run", list[Any]()
    gated(monkeypatch, 4, lambda: found.extend(checkpoint.run_steps(run)))
    assert train.main([*tiny, "--save-async", "--save-every", "2", "--keep", "9"]) == 0
    assert not found, "a checkpoint was complete before its files"
    assert list(checkpoint.run_steps(run)) == [2, 4, 6]
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_by_time_are_written_behind(tiny: list[str], tmp_path: Path) -> None:
    options = ["--save-async", "--save-every", "0.001s", "--keep", "99", "--steps", "8"]
    assert train.main([*tiny, *options]) == 0
    found = list(checkpoint.run_steps(tmp_path / "run"))
    assert len(found) >= 3 and found[-1] == 8
    for path in checkpoint.run_steps(tmp_path / "run").values():
        assert checkpoint.RunRecord.read(path).config["save_async"] is True


def test_a_full_disk_behind_ends_the_run_with_one_line(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, usual = tmp_path / "run", saving.write_safetensors

    def full(path: Path, blocks: Any) -> Any:
        if path.parent.name == "step-00000004":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(path, blocks)

    monkeypatch.setattr(saving, "write_safetensors", full)
    assert train.main([*tiny, "--save-async", "--save-every", "2"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and "step-00000004 could not be written: No space left" in errors[0]
    assert names(run / "checkpoints") == ["step-00000002"]


def test_a_step_that_fails_waits_for_the_checkpoint_before_it(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Diverge while the checkpoint of the step before is in flight, which is then set aside."""
    from minillm.training.verdict import NotFinite

    usual = Trainer.step

    def diverging(self: Trainer, number: int) -> StepReport:
        if number == 4:
            raise NotFinite("step 5: the loss is nan", 4)
        return usual(self, number)

    monkeypatch.setattr(Trainer, "step", diverging)
    assert train.main([*tiny, "--save-async", "--save-every", "2", "--keep", "9"]) == 1
    assert "set aside as left-step-00000004" in capsys.readouterr().err
    assert names(tmp_path / "run" / "checkpoints") == ["left-step-00000004", "step-00000002"]


@pytest.mark.parametrize("renames", [pytest.param("files", marks=pytest.mark.slow), "nothing"])
@pytest.mark.slow
def test_a_run_needs_no_rename(renames: str, tiny: list[str], tmp_path: Path) -> None:
    """Train, go back, and start a copy; compare with the same on a usual file system."""
    found = []
    for name, system in (("usual", FileSystem()), ("odd", FileSystem(renames))):
        run, copy = tmp_path / name, tmp_path / f"{name} copy"
        old = str(run / "checkpoints" / "step-00000002")
        often = ["--save-every", "2", "--keep", "9", "--log-to", "csv"]
        with system.standing():
            assert train.main([*tiny, "--out", str(run), *often]) == 0
            assert train.main(["--resume", old, "--out", str(copy)]) == 0
            assert train.main(["--resume", old]) == 0
        assert bool(system.refused) == (name == "odd")
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]
        story = [
            (curve(folder), names(folder), names(folder / "checkpoints"), weights(folder))
            for folder in (run, copy)
        ]
        rows = (run / "metrics.csv").read_text().splitlines()
        found.append((story, [row.split(",")[:2] for row in rows]))
    assert found[0] == found[1]
    assert found[0][0][0][2] == [
        *("left-step-00000004", "left-step-00000006"),
        *(f"step-0000000{step}" for step in (2, 4, 6)),
    ]


METHODS: dict[str, list[str]] = {
    "node-shared": ["--node-shared", "on"],
    "zero3": ["--zero", "3"],
    "pp": ["--pp", "2"],
    "local": ["--local-steps", "3"],
    "topk": ["--compress", "topk"],
    "async": ["--server", "async"],
    "servers": ["--server", "stale", "--servers", "1"],
}
BEHIND = ["--save-async", "--sample-tokens", "0", "--keep", "9"]


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ranks_save_behind_and_go_on(method: str, tiny: list[str], tmp_path: Path) -> None:
    """Save each third step behind on two workers, and resume from the last but one."""
    ranks = 3 if "--servers" in METHODS[method] else 2
    words = [*tiny, *METHODS[method], *BEHIND, "--save-every", "3", "--steps", "9"]
    found = mpirun(ranks, [*TRAIN, *words])
    assert found.returncode == 0 and "written behind" in found.output, found.output
    run = tmp_path / "run"
    assert list(checkpoint.run_steps(run)) == [3, 6, 9]
    before = curve(run)
    again = mpirun(ranks, [*TRAIN, "--resume", str(checkpoint.run_steps(run)[6])])
    assert again.returncode == 0, again.output
    if "--server" not in METHODS[method]:
        assert curve(run) == before
    assert not left_behind(run)


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("method", ["node-shared", "zero3", "local"])
def test_a_rank_killed_while_checkpoints_are_written(
    method: str, tiny: list[str], tmp_path: Path
) -> None:
    """Save every step, kill a rank in step 4, and compare the bits of the run that goes on."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, *METHODS[method], *BEHIND, "--save-every", "1"]
    done = mpirun(2, [*TRAIN, *options, "--out", str(whole)])
    assert done.returncode == 0, done.output
    found = finish(start(2, [PROGRAM, "kill", "1", *options]))
    assert found.returncode != 0
    steps = checkpoint.run_steps(run)
    assert list(steps) in ([1], [1, 2], [1, 2, 3]), steps
    again = mpirun(2, [*TRAIN, "--resume", str(run)])
    assert again.returncode == 0 and f"at step {list(steps)[-1]}\n" in again.output, again.output
    assert curve(run) == curve(whole)
    assert list(checkpoint.run_steps(run)) == [1, 2, 3, 4, 5, 6]


@needs_mpirun
@pytest.mark.slow
def test_a_full_disk_behind_is_one_line_of_all_ranks(tiny: list[str], tmp_path: Path) -> None:
    found = mpirun(2, [PROGRAM, "full", "1", *tiny, *BEHIND, "--save-every", "4"])
    assert found.returncode == 1, found.output
    assert found.output.count("error: ") == 1 and "Traceback" not in found.output, found.output
    assert "step-00000004 could not be written: rank 1: File too large" in found.output
    assert names(tmp_path / "run" / "checkpoints") == []


@needs_mpirun
@pytest.mark.slow
def test_a_signal_waits_for_the_checkpoint(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = ["--steps", "1000000", "--eval-every", "0", "--save-every", "5"]
    process = start(2, [*TRAIN, *tiny, *BEHIND, *endless])
    wait_for_steps(process, run, 12)
    os.killpg(process.pid, signal.SIGINT)
    found = finish(process)
    step = len(lines_of(run))
    assert f"stopped at step {step} as asked" in found.output, found.output
    assert list(checkpoint.run_steps(run))[-1] == step
