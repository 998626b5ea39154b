"""Helpers of checkpoint tests: runs that save and load, and views of the files they leave."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from training_helpers import INIT_STD, Layout, assemble, make_batches, make_config

from minillm import checkpoint
from minillm.checkpoint import CheckpointSource, StateTensor, save
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Segment, ShardSpec, slice_shape
from minillm.tasks.language_model import LanguageModeling
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import Trainer

WIDE = Layout(dp=2, tp=2, pp=2, num_microbatches=2)
TINY = dict(layers=2, heads=4, dim=16, ffn_dim=24, context=8, batch=8)


def new_trainer(comm: Communicator, config: ResolvedConfig) -> Trainer:
    return Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)


def save_trainer(
    trainer: Trainer, directory: Path, step: int, keep: int = 2, meta: dict[str, Any] | None = None
) -> Path:
    mesh = trainer.mesh
    return save(
        directory,
        world=trainer.world,
        mesh_shape=mesh.shape,
        coords=mesh.coords,
        tensors=trainer.state(),
        meta=meta or {},
        step=step,
        keep=keep,
    )


def load_trainer(trainer: Trainer, path: Path) -> None:
    checkpoint.load(
        CheckpointSource(path), trainer.state(), trainer.mesh.shape, trainer.mesh.coords
    )


def state_pieces(trainer: Trainer) -> dict[str, Any]:
    """Return the pieces of all state that a checkpoint holds, as `training_helpers.pieces`."""
    mesh = trainer.mesh
    return {
        t.name: (
            t.spec.shape,
            [
                (g, t.data[here].reshape(slice_shape(g)).copy())
                for g, here in t.spec.pieces(mesh.shape, mesh.coords)
            ],
        )
        for t in trainer.state()
    }


def trained(
    layout: Layout, directory: Path, model: str = "gpt2", steps: int = 2, **changes: Any
) -> dict[str, np.ndarray]:
    """Train, save, and return the global state."""

    def rank(comm: Communicator) -> dict[str, Any]:
        trainer = new_trainer(comm, make_config(model, layout, **(TINY | changes)))
        for step in range(steps):
            trainer.step(step)
        save_trainer(trainer, directory, steps)
        return state_pieces(trainer)

    return assemble(run_ranks(layout.num_ranks, rank))


def small_options(
    comm: Communicator,
    directory: Path,
    step: int,
    value: float = 1.0,
    keep: int = 9,
    meta: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return what `save` takes for one array cut over tp and one that all ranks hold."""
    mesh = MeshShape(tp=comm.size)
    cut = ShardSpec((6, 4), ((Segment(6, ("tp",)),), (Segment(4),)), pad=True)
    tensors = [
        StateTensor("cut", cut, np.full(cut.local_shape(mesh), value, np.float32)),
        StateTensor("whole", ShardSpec.replicated(3), np.full(3, value, np.float32)),
    ]
    return options | dict(
        directory=directory,
        world=comm,
        mesh_shape=mesh,
        coords=mesh.coords(comm.rank),
        tensors=tensors,
        meta=meta or {},
        step=step,
        keep=keep,
    )


def small_save(comm: Communicator, directory: Path, step: int, *args: Any, **options: Any) -> Path:
    return save(**small_options(comm, directory, step, *args, **options))


def small_run(directory: Path, *steps: int, num_ranks: int = 2, **options: Any) -> list[Path]:
    return [
        run_ranks(
            num_ranks, lambda comm, s=step: small_save(comm, directory, s, float(s), **options)
        )[0]
        for step in steps
    ]


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it a checksum that fits, so that only its meaning is wrong."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    file.write_text(json.dumps(body | {"sha256": digest}))
