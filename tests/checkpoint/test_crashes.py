"""A crash at any operation loses nothing older, on file systems with and without rename."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import small_options, small_run, small_save
from odd_file_systems import Crash, FileSystem, names

from minillm import checkpoint
from minillm.checkpoint import CheckpointSource, SaveBehind, folders, policy, save
from minillm.comm.single import SelfCommunicator

RENAMES = ["all", "files", "nothing"]
CASES = [
    pytest.param(
        step,
        renames,
        behind,
        id=f"step {step}-{renames}-{'behind' if behind else 'at once'}",
        marks=() if (step, renames, behind) == (30, "nothing", True) else pytest.mark.slow,
    )
    for step in (20, 30)  # again, and a new one
    for renames in RENAMES
    for behind in (False, True)
]
COMM = SelfCommunicator()


def values(path: Path) -> float:
    """Return the value that all elements of a checkpoint have, after a check of its files."""
    checkpoint.verify(path, COMM)
    source = CheckpointSource(path)
    found = np.unique(
        [
            *source.read("whole", (slice(0, 3),)),
            *source.read("cut", (slice(0, 6), slice(0, 4))).flat,
        ]
    )
    assert len(found) == 1, f"{path} is torn"
    return float(found[0])


def crashes(
    directory: Path, renames: str, prepare: Callable[[Path], Any], work: Callable[[Path], Any]
) -> list[Path]:
    """Run `work` on folders that `prepare` fills, dying at each operation; return the folders."""
    found: list[Path] = []
    while True:
        folder = directory / f"{len(found):03d}"
        prepare(folder)
        with FileSystem(renames).standing(dying_at=len(found)):
            try:
                work(folder)
            except Crash:
                found.append(folder)
                continue
        assert len(found) > 3, "the crashes missed the work"
        return found


def saved(behind: bool, folder: Path, step: int) -> None:
    """Save 7 as a step, if `behind` in a thread."""
    options = small_options(COMM, folder, step, 7.0, keep=2)
    SaveBehind(**options).wait() if behind else save(**options)


@pytest.mark.parametrize(("step", "renames", "behind"), CASES)
def test_a_crash_amid_a_save_loses_nothing_older(
    step: int, renames: str, behind: bool, tmp_path: Path
) -> None:
    """Die amid the save of a step, and see old checkpoints whole and the next save go through."""
    for folder in crashes(
        tmp_path,
        renames,
        lambda folder: small_run(folder, 10, 20, num_ranks=1),
        lambda folder: saved(behind, folder, step),
    ):
        found = {number: values(path) for number, path in checkpoint.run_steps(folder).items()}
        assert found.get(10, 10.0) == 10.0, "a checkpoint was altered"
        assert step == 20 or found.get(20) == 20.0, "a checkpoint was lost or altered"
        if 7.0 not in found.values():
            # Where files are not renamed, a crash amid its new manifest takes the step itself.
            assert 10 in found and (20 in found or (step == 20 and renames == "nothing"))
        assert checkpoint.find(folder).name == f"step-{max(found):08d}"
        small_save(COMM, folder, 40, 40.0, keep=2)
        assert len(names(folder)) == 2 and names(folder)[-1] == "step-00000040"
        assert {path.name for path in folder.iterdir() if values(path)} == set(names(folder))


@pytest.mark.slow
@pytest.mark.parametrize("renames", RENAMES)
def test_a_crash_amid_setting_aside_leaves_a_course_without_a_hole(
    renames: str, tmp_path: Path
) -> None:
    for folder in crashes(
        tmp_path,
        renames,
        lambda folder: small_run(folder, 10, 20, 30, num_ranks=1),
        lambda folder: checkpoint.set_aside(folder, 10),
    ):
        steps = list(checkpoint.run_steps(folder))
        assert steps in ([10], [10, 20], [10, 20, 30])
        for number, path in checkpoint.run_steps(folder).items():
            assert values(path) == number
        checkpoint.set_aside(folder, 10)
        assert list(checkpoint.run_steps(folder)) == [10]
        for number in (20, 30):
            assert values(folder / f"left-step-000000{number}") == number
        small_save(COMM, folder, 11, 11.0)
        assert names(folder) == [
            *("left-step-00000020", "left-step-00000030", "step-00000010", "step-00000011"),
        ]


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EXDEV", "ENOTSUP", "EMFILE"])
@pytest.mark.parametrize("renames", ["files", "nothing"])
def test_without_rename_runs_save_thin_out_and_go_back(
    renames: str, error: str, tmp_path: Path
) -> None:
    with FileSystem(renames, getattr(errno, error)).standing() as system:
        small_run(tmp_path, 10, 20, 30, 40, num_ranks=2, keep=3)
        assert names(tmp_path) == ["step-00000020", "step-00000030", "step-00000040"]
        small_run(tmp_path, 25, num_ranks=1, keep=2)  # from 20
    assert system.refused
    assert names(tmp_path) == [
        *("left-step-00000030", "left-step-00000040", "step-00000020", "step-00000025"),
    ]
    for path in tmp_path.iterdir():
        assert values(path) == int(path.name[-8:])


def test_an_old_checkpoint_that_stays_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path, 10, 20)
    usual, said = folders.remove, []

    def remove(path: Path) -> None:
        if path.name == "step-00000010":
            raise PermissionError(errno.EACCES, "Permission denied")
        usual(path)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "remove", remove)
        small_save(COMM, tmp_path, 30, 30.0, keep=1, say=said.append)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]
    assert said == [
        f"{tmp_path / 'step-00000010'} cannot be removed (Permission denied); the next save retries"
    ]
    small_save(COMM, tmp_path, 40, 40.0, keep=1)
    assert names(tmp_path) == ["step-00000040"]


def test_folders_without_a_whole_manifest_are_no_checkpoints(tmp_path: Path) -> None:
    paths = small_run(tmp_path, 10, 20, 30, 40)
    (paths[3] / "manifest.json").unlink()
    text = (paths[2] / "manifest.json").read_bytes()
    inner = text.index(b"}}") + 1
    for cut in (0, 1, inner, len(text) // 2, len(text) - 2):
        (paths[2] / "manifest.json").write_bytes(text[:cut])
        assert list(checkpoint.run_steps(tmp_path)) == [10, 20]
        assert checkpoint.find(tmp_path) == paths[1]
    small_run(tmp_path, 21, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000021"]


def test_what_was_no_save_is_not_cleaned_up(tmp_path: Path) -> None:
    (path,) = small_run(tmp_path, 10)
    (path / "manifest.json").write_bytes(bytes(300))  # zeros: the weights may still be saved
    small_run(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    small_run(tmp_path, 10, keep=1)
    assert values(path) == 10.0 and len(names(path)) == 3
