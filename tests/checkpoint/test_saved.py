"""Content of a checkpoint: every element once, readable on any mesh."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY, WIDE, load_trainer, new_trainer, state_pieces, trained
from training_helpers import Layout, assemble, make_config

from minillm import checkpoint
from minillm.checkpoint import CheckpointSource, StateTensor, save
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Segment, ShardSpec


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_saved_on_eight_ranks_loads_on_any_mesh(model: str, tmp_path: Path) -> None:
    expected = trained(WIDE, tmp_path, model)
    found = checkpoint.find(tmp_path)
    assert found == tmp_path / "step-00000002"
    source = CheckpointSource(found)
    assert set(source.names()) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(
            source.read(name, tuple(slice(0, size) for size in array.shape)), array
        )

    def rank(comm: Communicator, layout: Layout) -> dict[str, Any]:
        trainer = new_trainer(comm, make_config(model, layout, **TINY))
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, found)
        for tensor in trainer.state():
            assert not np.isnan(tensor.data).any(), f"{tensor.name}: padding was not zeroed"
        return state_pieces(trainer)

    for layout in (
        Layout(),
        Layout(tp=4),
        Layout(pp=2, num_microbatches=2),
        Layout(tp=2, dp=2),
        Layout(dp=4),
    ):
        loaded = assemble(
            run_ranks(layout.num_ranks, lambda comm, layout=layout: rank(comm, layout))
        )
        for name, array in expected.items():
            np.testing.assert_array_equal(loaded[name], array)


def test_every_element_lies_in_exactly_one_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    expected = trained(WIDE, tmp_path)
    path = checkpoint.find(tmp_path)
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    num_stored = sum(array.size for arrays in files.values() for array in arrays.values())
    assert num_stored == sum(
        array.size for array in expected.values()
    )  # padding nowhere, tied weights and replicas once
    manifest = checkpoint.read_manifest(path)
    listed = Counter(
        (piece.file, piece.key) for entry in manifest.tensors.values() for piece in entry.pieces
    )
    assert set(listed.values()) == {1}
    assert set(listed) == {(file, key) for file, arrays in files.items() for key in arrays}
    for name, entry in manifest.tensors.items():
        whole = np.full(entry.shape, np.nan)
        for piece in entry.pieces:
            block = whole[tuple(slice(lo, hi) for lo, hi in piece.bounds)]
            assert np.isnan(block).all(), f"{name} is written twice"
            block[...] = files[piece.file][piece.key]
        np.testing.assert_array_equal(whole, expected[name])


def test_vocabulary_padding_is_not_on_disk_and_zero_after_loading(tmp_path: Path) -> None:
    trained(Layout(tp=2), tmp_path, steps=1)
    manifest = checkpoint.read_manifest(checkpoint.find(tmp_path))
    assert manifest.tensors["model/embedding.weight"].shape == (29, 16)

    def rank(comm: Communicator) -> np.ndarray:
        trainer = new_trainer(comm, make_config("gpt2", Layout(tp=4), **TINY))
        tensor = next(t for t in trainer.state() if t.name == "model/embedding.weight")
        tensor.data[...] = 7
        load_trainer(trainer, tmp_path / "step-00000001")
        return tensor.data.copy()

    last = run_ranks(4, rank)[3]
    assert last.shape == (8, 16)
    assert np.all(last[5:] == 0)  # 29 = 3 * 8 + 5
    assert np.all(np.abs(last[:5]).sum(1) > 0)


def test_tied_weight_is_written_by_the_first_stage_and_read_by_both(tmp_path: Path) -> None:
    layout = Layout(pp=2, num_microbatches=2)
    expected = trained(layout, tmp_path, steps=1)["model/embedding.weight"]
    path = checkpoint.find(tmp_path)
    assert [
        piece.file
        for piece in checkpoint.read_manifest(path).tensors["model/embedding.weight"].pieces
    ] == ["rank-00000.safetensors"]

    def rank(comm: Communicator) -> np.ndarray:
        trainer = new_trainer(comm, make_config("gpt2", layout, seed=8, **TINY))
        load_trainer(trainer, path)
        return next(t for t in trainer.state() if t.name == "model/embedding.weight").data.copy()

    for copy in run_ranks(2, rank):
        np.testing.assert_array_equal(copy, expected)


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    trained(Layout(dp=4), tmp_path, steps=1)
    sizes = [
        entry.size for entry in checkpoint.read_manifest(checkpoint.find(tmp_path)).files.values()
    ]
    assert len(sizes) == 4
    assert max(sizes) < 0.6 * sum(sizes)


def test_pieces_of_one_array_may_have_different_holders(tmp_path: Path) -> None:
    """Check an array of two segments, one cut over tp and one replicated.

    All ranks hold the replicated segment, but one rank writes it.
    """
    spec = ShardSpec((10,), ((Segment(4, ("tp",)), Segment(6)),))
    mesh, whole = MeshShape(dp=2, tp=2), np.arange(10.0)

    def rank(comm: Communicator) -> None:
        coords = mesh.coords(comm.rank)
        data = np.zeros(spec.local_shape(mesh))
        for global_slices, local_slices in spec.pieces(mesh, coords):
            data[local_slices] = whole[global_slices]
        save(
            tmp_path,
            world=comm,
            mesh_shape=mesh,
            coords=coords,
            tensors=[StateTensor("x", spec, data)],
            meta={},
            step=1,
            keep=1,
        )

    run_ranks(4, rank)
    np.testing.assert_array_equal(
        CheckpointSource(checkpoint.find(tmp_path)).read("x", (slice(1, 9),)), whole[1:9]
    )


def test_meta_step_and_scalars_come_back(tmp_path: Path) -> None:
    meta = {
        "config": {"lr": 0.1, "out": None, "beta": 1e-300},
        "sizes": (1, 2),
        "by number": {3: "ü", 20: "x"},
    }
    data = np.array(2.5)
    path = run_ranks(
        1,
        lambda comm: save(
            tmp_path / "new" / "folder",
            world=comm,
            mesh_shape=MeshShape(),
            coords=MeshShape().coords(0),
            tensors=[StateTensor("scalar", ShardSpec.replicated(), data)],
            meta=meta,
            step=123456789,
            keep=1,
        ),
    )[0]
    manifest = checkpoint.read_manifest(path)
    assert path.name == "step-123456789"
    assert manifest.step == 123456789
    assert manifest.meta == json.loads(json.dumps(meta))
    assert CheckpointSource(path).read("scalar", ()) == 2.5
