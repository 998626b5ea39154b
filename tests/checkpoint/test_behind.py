"""A checkpoint that is written behind equals the one of its step, although training went on."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import contents, small_options, small_run
from layouts import fits
from odd_file_systems import names
from parallel.method_cells import VARIANTS, config_of, optimizer_of
from training_helpers import INIT_STD, OPTIMIZERS, Layout, make_task

from minillm import checkpoint
from minillm.base.errors import CheckpointError, MinillmError
from minillm.checkpoint import SaveBehind, StateTensor, save
from minillm.checkpoint.part import Part, own_part
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.layout.sharding import ShardSpec
from minillm.training.memory import predicted
from minillm.training.serving import make_server, with_servers
from minillm.training.trainer import Trainer

save_module = sys.modules["minillm.checkpoint.save"]  # the name in the package is the function


class Gate:
    """Gate before the files that are written behind, which a test opens."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, usual = threading.Event(), save_module.write_safetensors

        def write(path: Path, blocks: Any) -> Any:
            if threading.current_thread().name == "checkpoint":
                assert self.open.wait(60)
            return usual(path, blocks)

        patch.setattr(save_module, "write_safetensors", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Return a closed gate."""
    found = Gate(monkeypatch)
    yield found
    found.open.set()


def cells() -> list[tuple[str, Layout, str]]:
    """Return each method on a layout; tied weights on two stages, and a state of rows, beside."""
    found = []
    for name, variant in VARIANTS.items():
        wide = Layout(dp=2, pp=2, num_microbatches=3)
        layout = next(
            at for at in (wide, Layout(dp=2), Layout(dp=4)) if variant.fits(at) and fits("gpt2", at)
        )
        found.append(("gpt2", layout, name))
    return [*found, ("lstm", Layout(dp=2), "all-reduce"), ("llama", Layout(tp=2, pp=2), "zero1")]


def save_twice(comm: Communicator, cell: Any, directory: Path, gate: Gate) -> None:
    """Save step 2 at once, and behind so that it is written after step 3."""
    model, layout, name = cell
    config, kind = config_of((model, layout, "", name)), OPTIMIZERS[optimizer_of(name)]

    def work(workers: Communicator, wire: Communicator | None) -> None:
        trainer = Trainer(
            config, workers, make_task(config), std=INIT_STD, optimizer=kind, wire=wire
        )
        method, mesh = trainer.replication, trainer.mesh

        def options(place: str) -> dict[str, Any]:
            return dict(
                directory=directory / place,
                world=workers,
                mesh_shape=mesh.shape,
                coords=mesh.coords,
                tensors=trainer.state(),
                meta={},
                step=2,
                keep=1,
            )

        for step in range(2):
            trainer.step(step)
        method.meet()
        with method.agreed():
            save(**options("at once"))
            behind = SaveBehind(**options("behind"))
        trainer.step(2)
        method.meet()
        workers.barrier()
        gate.open.set()
        behind.wait()
        assert behind.path == directory / "behind" / "step-00000002"
        with method.agreed():
            save(**options("later"))

    with_servers(
        comm,
        config,
        work,
        lambda wire, config: make_server(wire, config, std=INIT_STD, optimizer=kind),
    )


def saved_twice(cell: Any, directory: Path, gate: Gate) -> list[dict[str, bytes]]:
    model, layout, name = cell
    ranks = layout.num_ranks + config_of((model, layout, "", name)).replication.num_servers
    gate.open.clear()
    run_ranks(ranks, lambda comm: save_twice(comm, cell, directory, gate))
    return [contents(directory / place) for place in ("at once", "behind", "later")]


CELLS = cells()
SOME = ("all-reduce", "node", "zero3", "local")


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell, marks=() if cell[2] in SOME else pytest.mark.slow, id=f"{cell[2]}-{cell[0]}"
        )
        for cell in CELLS
    ],
)
def test_what_is_written_behind_is_the_state_of_its_step(
    cell: Any, tmp_path: Path, gate: Gate
) -> None:
    at_once, behind, later = saved_twice(cell, tmp_path, gate)
    assert behind == at_once
    assert any(later[name] != found for name, found in at_once.items()), "nothing was trained"


def test_the_comparison_sees_a_state_that_is_not_copied(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "copied", lambda self: self)
    at_once, behind, _ = saved_twice(CELLS[0], tmp_path, gate)
    assert behind.keys() == at_once.keys() and behind != at_once


def test_no_rank_waits_before_all_have_written(tmp_path: Path, gate: Gate) -> None:
    """Advance while the gate is closed, and count the calls of each rank after it is open."""
    directory = tmp_path / "behind"
    small_run(directory, 10)

    def rank(comm: Communicator) -> int:
        saving = begin(comm, directory, 20)
        for _ in range(3):
            saving.advance()
        assert saving.path is None and checkpoint.find(directory).name == "step-00000010"
        comm.barrier()
        gate.open.set()
        calls = 0
        while saving.path is None:
            saving.advance()
            calls += 1
            time.sleep(0.001)
        return calls

    calls = run_ranks(3, rank)
    assert len(set(calls)) == 1
    assert checkpoint.find(directory).name == "step-00000020"


def begin(comm: Communicator, directory: Path, step: int) -> SaveBehind:
    return SaveBehind(**small_options(comm, directory, step))


@pytest.mark.parametrize("where", ["rank-00001.safetensors", "manifest.json"])
def test_a_full_disk_behind_is_an_error_of_all_ranks(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail in the thread of one rank, and see all ranks raise when the save goes on."""
    small_run(tmp_path, 10)
    before = contents(tmp_path)

    def full(usual: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: Path, *args: Any, **options: Any) -> Any:
            if path.name == where:
                assert threading.current_thread().name == "checkpoint"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return usual(path, *args, **options)

        return write

    for name in ("write_safetensors", "write_bytes"):
        monkeypatch.setattr(save_module, name, full(getattr(save_module, name)))

    def rank(comm: Communicator) -> str:
        saving = begin(comm, tmp_path, 20)
        with pytest.raises(
            CheckpointError, match=r"step-00000020 could not be written: rank [01]: No space left"
        ) as caught:
            while saving.path is None:
                saving.advance()
        return str(caught.value)

    assert len(set(run_ranks(3, rank))) == 1
    assert contents(tmp_path) == before and names(tmp_path) == ["step-00000010"]


def test_a_copy_that_memory_does_not_hold_is_an_error_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(data: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(sys.modules["minillm.checkpoint.part"], "_copy", none_left)

    def rank(comm: Communicator) -> None:
        with pytest.raises(MinillmError, match="no memory for a copy of 0 MB; leave --save-async"):
            begin(comm, tmp_path, 20)

    run_ranks(2, rank)
    assert not list(tmp_path.iterdir())


BLOCKS, BLOCK_BYTES = 8, 1 << 20


def memory_of(directory: Path, behind: bool) -> tuple[float, float]:
    """Save an array of 8 blocks; return the memory at its most and after the end.

    Both are beside the array, as parts of its size.
    """
    array = np.zeros((BLOCKS, BLOCK_BYTES // 8))
    spec = ShardSpec.replicated(BLOCK_BYTES // 8)
    tensors = [StateTensor(f"block {i}", spec, block) for i, block in enumerate(array)]
    options = small_options(SelfCommunicator(), directory, 20) | dict(tensors=tensors)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        if behind:
            saving = SaveBehind(**options)
            saving.wait()
            assert saving.path is not None
        else:
            save(**options)
        found = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    after, most = ((value - before) / array.nbytes for value in found)
    return most, after


def test_memory_holds_one_copy_and_not_for_longer(tmp_path: Path) -> None:
    """Allow a block more while a file is written."""
    slack = 1.5 / BLOCKS
    at_once, behind = (memory_of(tmp_path / str(way), way) for way in (False, True))
    assert at_once[0] <= slack and 1 <= behind[0] <= 1 + slack
    assert max(at_once[1], behind[1]) <= slack


@pytest.mark.parametrize("planted", ["twice", "kept"])
def test_a_copy_too_many_is_seen(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, kept = Part.copied, list[Part]()

    def copied(part: Part) -> Part:
        found = usual(usual(part)) if planted == "twice" else usual(part)
        kept.append(found)
        return found

    monkeypatch.setattr(Part, "copied", copied)
    with pytest.raises(AssertionError):
        test_memory_holds_one_copy_and_not_for_longer(tmp_path)


ALONE = [cell for cell in CELLS if "servers" not in VARIANTS[cell[2]].options]


@pytest.mark.parametrize("cell", ALONE, ids=lambda cell: f"{cell[2]}-{cell[0]}")
def test_the_prediction_counts_the_copy(cell: Any) -> None:
    """Compare the copy of each rank with the prediction, an upper bound.

    No rank copies more than the replicas of the largest stage together.
    """
    model, layout, name = cell
    config = config_of((model, layout, "", name))
    config = dataclasses.replace(config, options=config.options.replace(save_async=True))

    def rank(comm: Communicator) -> tuple[tuple[int, int], int, int, int]:
        trainer = Trainer(config, comm, make_task(config), std=INIT_STD)
        with trainer.replication.agreed():
            mesh = trainer.mesh
            part = own_part(trainer.state(), mesh.shape, mesh.coords)
        place = mesh.coord("pp"), mesh.coord("tp")
        need = predicted(config, trainer.model.layout, place[0])
        return place, part.num_bytes, part.copied().num_bytes, need.kinds["checkpoint"]

    found, together = run_ranks(layout.num_ranks, rank), Counter[tuple[int, int]]()
    for place, held, _, _ in found:
        together[place] += held
    most = 1.05 * max(together.values())
    assert all(held == copied and held <= need <= most for _, held, copied, need in found)
