"""Saving is atomic and keeps the newest checkpoints."""

import builtins
import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import (
    contents,
    small_run,
    small_save,
)
from odd_file_systems import names

from minillm import checkpoint
from minillm.base.errors import CheckpointError
from minillm.checkpoint import CheckpointSource, StateTensor, save
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import ShardSpec

save_module = sys.modules["minillm.checkpoint.save"]  # the name in the package is the function


@pytest.mark.parametrize("where", ["rank-00001.safetensors", "manifest.json", "rename"])
@pytest.mark.parametrize("step", [20, 25], ids=["a step again", "a new step"])
def test_full_disk_leaves_what_was_there(
    step: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path, 10, 20, num_ranks=4)
    before = contents(tmp_path)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    open_, replace, number = io.open, os.replace, where.removesuffix(".safetensors")

    def full_open(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        stream = open_(path, mode, *args, **options)
        if number not in str(path) or not set(mode) & set("wx"):
            return stream
        stream.write("half" if "b" not in mode else b"half")
        stream.close()
        raise error

    def full_replace(path: Path, target: Path) -> None:
        if where == "rename":
            raise error
        replace(path, target)

    def rank(comm: Communicator) -> str:
        with pytest.raises(
            CheckpointError,
            match=rf"step-000000{step} could not be written: rank [01]: No space left on device",
        ) as caught:
            small_save(comm, tmp_path, step, 5.0, keep=1)
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", full_open)
        patch.setattr(builtins, "open", full_open)
        patch.setattr(os, "replace", full_replace)
        messages = run_ranks(4, rank)
    assert len(set(messages)) == 1
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    small_run(tmp_path, 30, num_ranks=4)
    assert checkpoint.find(tmp_path).name == "step-00000030"


def test_several_failing_ranks_make_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, blocks: Any) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(save_module, "write_safetensors", fails)

    def rank(comm: Communicator) -> str:
        with pytest.raises(
            CheckpointError, match=r"rank 0 \(and 2 more ranks\).*rank-00000\.safetensors"
        ) as caught:
            small_save(comm, tmp_path, 1)
        return str(caught.value)

    assert len(set(run_ranks(3, rank))) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def rank(comm: Communicator) -> str:
        with pytest.raises(
            CheckpointError,
            match=r"could not be written: rank 0.*folder that all ranks can write to",
        ) as caught:
            small_save(comm, tmp_path / "file" / "run", 1)
        return str(caught.value)

    assert len(set(run_ranks(2, rank))) == 1


def test_ranks_that_disagree_about_shards_are_found(tmp_path: Path) -> None:
    def rank(comm: Communicator) -> None:
        mesh = MeshShape(pp=2)
        tensors = [StateTensor("x", ShardSpec.replicated(2), np.zeros(2))]  # both stages claim it
        with pytest.raises(
            CheckpointError, match="disagree about who holds what: the pieces of x have 4 elements"
        ):
            save(
                tmp_path,
                world=comm,
                mesh_shape=mesh,
                coords=mesh.coords(comm.rank),
                tensors=tensors,
                meta={},
                step=1,
                keep=1,
            )

    run_ranks(2, rank)
    assert not list(tmp_path.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        small_run(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    small_run(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-00000025"]


def test_a_step_is_replaced_by_a_later_save(tmp_path: Path) -> None:
    small_run(tmp_path, 7, num_ranks=4)
    run_ranks(2, lambda comm: small_save(comm, tmp_path, 7, 0.5))
    assert names(tmp_path) == ["step-00000007"]
    path = checkpoint.find(tmp_path)
    files = ["rank-00000-2.safetensors", "rank-00001-2.safetensors"]
    assert names(path) == ["manifest.json", *files]
    assert np.all(CheckpointSource(path).read("whole", (slice(0, 3),)) == 0.5)
    run_ranks(1, lambda comm: small_save(comm, tmp_path, 7, 0.25))
    assert names(path) == ["manifest.json", "rank-00000.safetensors"]


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    small_run(tmp_path, 1)
    for name in (".tmp-step-00000002", "step-00000009", "left-step-00000007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").write_text("{}")
    small_run(tmp_path, 2)
    assert names(tmp_path) == ["metrics.jsonl", "step-00000001", "step-00000002"]


def test_later_steps_of_an_abandoned_course_are_set_aside(tmp_path: Path) -> None:
    small_run(tmp_path, 10, 20, 30)
    small_run(tmp_path, 15, keep=1)  # resumed from 10
    assert names(tmp_path) == ["left-step-00000020", "left-step-00000030", "step-00000015"]
    assert checkpoint.find(tmp_path).name == "step-00000015"
    assert checkpoint.find(tmp_path / "left-step-00000030").name == "left-step-00000030"


def test_a_checkpoint_that_cannot_be_set_aside_is_an_error_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path, 10, 20)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "step-00000020":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    def rank(comm: Communicator) -> None:
        with pytest.raises(CheckpointError, match="step-00000020 cannot be renamed"):
            small_save(comm, tmp_path, 15, 5.0, keep=1)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        run_ranks(2, rank, timeout=5.0)
    assert "step-00000015" in names(tmp_path)
