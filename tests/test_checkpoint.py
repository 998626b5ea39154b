"""Checkpoints: written once, whole or not at all, readable on any mesh, refused when damaged, and good for the same bits on resume."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import INIT_STD, Layout, assemble, make_batches, make_config, pieces, with_layout

from minillm import checkpoint
from minillm.checkpoint import CheckpointSource, StateTensor, save
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import MeshShape
from minillm.comm.threads import run_ranks
from minillm.errors import CheckpointError
from minillm.resolve import ResolvedConfig
from minillm.sharding import Segment, ShardSpec
from minillm.trainer import Trainer

save_module = sys.modules["minillm.checkpoint.save"]  # the name in the package is the function

WIDE = Layout(dp=2, tp=2, pp=2, num_microbatches=2)
TINY = dict(layers=2, heads=4, dim=16, ffn_dim=24, context=8, batch=8)


def new_trainer(comm: Communicator, config: ResolvedConfig) -> Trainer:
    return Trainer(config, comm, make_batches(config), std=INIT_STD)


def save_trainer(trainer: Trainer, directory: Path, step: int, keep: int = 2, meta: dict[str, Any] | None = None) -> Path:
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
    checkpoint.load(CheckpointSource(path), trainer.state(), trainer.mesh.shape, trainer.mesh.coords)


def state_pieces(trainer: Trainer) -> dict[str, Any]:
    """As `training_helpers.pieces`, of everything that a checkpoint holds."""
    mesh = trainer.mesh
    return {
        t.name: (t.spec.shape, [(g, t.data[here].copy()) for g, here in t.spec.pieces(mesh.shape, mesh.coords)]) for t in trainer.state()
    }


def trained(layout: Layout, directory: Path, model: str = "gpt2", steps: int = 2, **changes: Any) -> dict[str, np.ndarray]:
    """Train, save, and return the global state."""

    def rank(comm: Communicator) -> dict[str, Any]:
        trainer = new_trainer(comm, make_config(model, layout, **(TINY | changes)))
        for step in range(steps):
            trainer.step(step)
        save_trainer(trainer, directory, steps)
        return state_pieces(trainer)

    return assemble(run_ranks(layout.num_ranks, rank))


def small_save(
    comm: Communicator, directory: Path, step: int, value: float = 1.0, keep: int = 9, meta: dict[str, Any] | None = None
) -> Path:
    """Save one array cut over tp and one that all ranks hold."""
    mesh = MeshShape(tp=comm.size)
    cut = ShardSpec((6, 4), ((Segment(6, ("tp",)),), (Segment(4),)), pad=True)
    tensors = [
        StateTensor("cut", cut, np.full(cut.local_shape(mesh), value, np.float32)),
        StateTensor("whole", ShardSpec.replicated(3), np.full(3, value, np.float32)),
    ]
    coords = mesh.coords(comm.rank)
    return save(directory, world=comm, mesh_shape=mesh, coords=coords, tensors=tensors, meta=meta or {}, step=step, keep=keep)


def small_run(directory: Path, *steps: int, num_ranks: int = 2, **options: Any) -> list[Path]:
    return [run_ranks(num_ranks, lambda comm, s=step: small_save(comm, directory, s, float(s), **options))[0] for step in steps]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it a checksum that fits, so that only its meaning is wrong."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    file.write_text(json.dumps(body | {"sha256": digest}))


# ---- what is written


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_saved_on_eight_ranks_loads_on_any_mesh(model: str, tmp_path: Path) -> None:
    expected = trained(WIDE, tmp_path, model)
    found = checkpoint.find(tmp_path)
    assert found == tmp_path / "step-00000002"
    source = CheckpointSource(found)
    assert set(source.names()) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(source.read(name, tuple(slice(0, size) for size in array.shape)), array)

    def rank(comm: Communicator, layout: Layout) -> dict[str, Any]:
        trainer = new_trainer(comm, make_config(model, layout, **TINY))
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, found)
        for tensor in trainer.state():
            assert not np.isnan(tensor.data).any(), f"{tensor.name}: padding was not zeroed"
        return state_pieces(trainer)

    for layout in (Layout(), Layout(tp=4), Layout(pp=2, num_microbatches=2), Layout(tp=2, dp=2), Layout(dp=4)):
        loaded = assemble(run_ranks(layout.num_ranks, lambda comm, layout=layout: rank(comm, layout)))
        for name, array in expected.items():
            np.testing.assert_array_equal(loaded[name], array)


def test_every_element_lies_in_exactly_one_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    expected = trained(WIDE, tmp_path)
    path = checkpoint.find(tmp_path)
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    num_stored = sum(array.size for arrays in files.values() for array in arrays.values())
    assert num_stored == sum(array.size for array in expected.values())  # padding nowhere, tied weights and replicas once
    manifest = checkpoint.read_manifest(path)
    listed = Counter((piece.file, piece.key) for entry in manifest.tensors.values() for piece in entry.pieces)
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
    assert [piece.file for piece in checkpoint.read_manifest(path).tensors["model/embedding.weight"].pieces] == ["rank-00000.safetensors"]

    def rank(comm: Communicator) -> np.ndarray:
        trainer = new_trainer(comm, make_config("gpt2", layout, seed=8, **TINY))
        load_trainer(trainer, path)
        return next(t for t in trainer.state() if t.name == "model/embedding.weight").data.copy()

    for copy in run_ranks(2, rank):
        np.testing.assert_array_equal(copy, expected)


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    trained(Layout(dp=4), tmp_path, steps=1)
    sizes = [entry.size for entry in checkpoint.read_manifest(checkpoint.find(tmp_path)).files.values()]
    assert len(sizes) == 4
    assert max(sizes) < 0.6 * sum(sizes)


def test_pieces_of_one_array_may_have_different_holders(tmp_path: Path) -> None:
    """A segment that is cut beside one that is not: the second is on all ranks, but written by one."""
    spec = ShardSpec((10,), ((Segment(4, ("tp",)), Segment(6)),))
    mesh, whole = MeshShape(dp=2, tp=2), np.arange(10.0)

    def rank(comm: Communicator) -> None:
        coords = mesh.coords(comm.rank)
        data = np.zeros(spec.local_shape(mesh))
        for global_slices, local_slices in spec.pieces(mesh, coords):
            data[local_slices] = whole[global_slices]
        save(tmp_path, world=comm, mesh_shape=mesh, coords=coords, tensors=[StateTensor("x", spec, data)], meta={}, step=1, keep=1)

    run_ranks(4, rank)
    np.testing.assert_array_equal(CheckpointSource(checkpoint.find(tmp_path)).read("x", (slice(1, 9),)), whole[1:9])


def test_meta_step_and_scalars_come_back(tmp_path: Path) -> None:
    meta = {"config": {"lr": 0.1, "out": None, "beta": 1e-300}, "sizes": (1, 2), "by number": {3: "ü", 20: "x"}}
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


# ---- resuming


def run_steps(comm: Communicator, config: ResolvedConfig, first: int, last: int, start: Path | None, end: Path | None) -> Any:
    trainer = new_trainer(comm, config)
    if start is not None:
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, checkpoint.find(start))
    losses = [trainer.step(step).loss for step in range(first, last)]
    if end is not None:
        save_trainer(trainer, end, last)
    return losses, state_pieces(trainer), pieces(trainer, "value")


def test_resuming_on_the_same_mesh_gives_the_same_bits(tmp_path: Path) -> None:
    config = make_config("gpt2", WIDE, **(TINY | {"dtype": "float32"}))
    whole = run_ranks(8, lambda comm: run_steps(comm, config, 0, 6, None, None))
    run_ranks(8, lambda comm: run_steps(comm, config, 0, 3, None, tmp_path))
    second = run_ranks(8, lambda comm: run_steps(comm, config, 3, 6, tmp_path, None))
    assert second[0][0] == whole[0][0][3:]
    expected, found = (assemble([result[1] for result in results], 0.0) for results in (whole, second))
    assert {name.split("/")[1] for name in expected if name.startswith("optimizer/")} == {"exp_avg", "exp_avg_sq"}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4, sp=True), Layout(pp=2, dp=2, num_microbatches=2, schedule="gpipe")], ids=str)
def test_resuming_on_another_mesh_agrees_to_rounding(layout: Layout, tmp_path: Path) -> None:
    before = make_config("gpt2", Layout(tp=2, dp=2), **TINY)
    after = make_config("gpt2", layout, **TINY)
    whole = run_ranks(4, lambda comm: run_steps(comm, before, 0, 6, None, None))
    run_ranks(4, lambda comm: run_steps(comm, before, 0, 3, None, tmp_path))
    second = run_ranks(layout.num_ranks, lambda comm: run_steps(comm, after, 3, 6, tmp_path, None))
    np.testing.assert_allclose(second[0][0], whole[0][0][3:], rtol=1e-10)
    expected, found = (assemble([result[2] for result in results]) for results in (whole, second))
    for name, array in expected.items():
        if not name.endswith("qkv.bias"):  # the key bias has a true gradient of 0, which AdamW turns into steps of rounding noise
            assert np.linalg.norm(found[name] - array) <= 1e-10 * np.linalg.norm(array), name


# ---- another model


def refusal(directory: Path, model: str = "gpt2", layout: Layout | None = None, **changes: Any) -> str:
    """The error of loading the newest checkpoint into a model; checks that nothing was changed."""

    def rank(comm: Communicator) -> str:
        trainer = new_trainer(comm, make_config(model, layout or Layout(), **(TINY | changes)))
        before = [tensor.data.copy() for tensor in trainer.state()]
        with pytest.raises(CheckpointError) as caught:
            load_trainer(trainer, checkpoint.find(directory))
        for tensor, array in zip(trainer.state(), before, strict=True):
            np.testing.assert_array_equal(tensor.data, array)
        return str(caught.value)

    return run_ranks(layout.num_ranks if layout else 1, rank)[0]


def test_another_model_is_refused(tmp_path: Path) -> None:
    trained(Layout(tp=2), tmp_path, steps=1)
    wider = refusal(tmp_path, dim=32)
    assert "another model" in wider
    assert "embedding.weight has shape (29, 16) instead of (29, 32)" in wider
    assert "more" in wider
    assert len(wider) < 800
    assert "float64 instead of float32" in refusal(tmp_path, dtype="float32")
    assert "it has no " in refusal(tmp_path, "llama")
    assert "it has no " in refusal(tmp_path, layers=4)
    with pytest.raises(CheckpointError, match="no tensor called nothing"):
        CheckpointSource(checkpoint.find(tmp_path)).read("nothing", ())


# ---- damage


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"runs/none does not exist"):
        checkpoint.find(Path("runs/none"))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*looked for folders like step-00000100 .*manifest\.json"):
        checkpoint.find(tmp_path)


def test_run_folder_checkpoints_folder_and_step_folder_are_found(tmp_path: Path) -> None:
    paths = small_run(tmp_path / "checkpoints", 90, 100)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == paths[1]
    assert checkpoint.find(paths[0]) == paths[0]
    renamed = paths[0].rename(tmp_path / "best")
    assert checkpoint.find(renamed) == renamed


def truncate(path: Path) -> None:
    with (path / "rank-00001.safetensors").open("r+b") as stream:
        stream.truncate(40)


def remove(path: Path) -> None:
    (path / "rank-00001.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-30])


def alter_manifest(path: Path) -> None:
    file = path / "manifest.json"
    text = file.read_text()
    assert '"step": 30' in text
    file.write_text(text.replace('"step": 30', '"step": 31'))


def foreign_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"weights": [1, 2]}')


def binary_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(bytes(range(256)))


def later_version(path: Path) -> None:
    rewrite_manifest(path, lambda body: body.update(version=2))


def escaping_file(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["files"].update({"../x": {"size": 1, "sha256": ""}}))


def lost_piece(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["tensors"]["cut"]["pieces"].pop())


def doubled_piece(path: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        pieces = body["tensors"]["cut"]["pieces"]
        pieces[1]["slices"] = pieces[0]["slices"]

    rewrite_manifest(path, change)


def missing_field(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["tensors"]["cut"].pop("shape"))


DAMAGES = {
    truncate: r"rank-00001\.safetensors is truncated or altered: it has 40 bytes instead of \d+",
    remove: r"rank-00001\.safetensors is missing",
    remove_manifest: r"manifest\.json is missing, so the checkpoint was never completed",
    truncate_manifest: r"manifest\.json is truncated or altered",
    alter_manifest: r"manifest\.json was altered",
    foreign_manifest: r"manifest\.json is not the manifest of a minillm checkpoint",
    binary_manifest: r"manifest\.json is truncated or altered",
    later_version: r"format version 2, but this minillm reads version 1",
    escaping_file: r"leads out of the folder",
    lost_piece: r"the pieces of cut have 12 elements, but shape \(6, 4\) has 24",
    doubled_piece: r"cut holds a piece twice",
    missing_field: r"malformed: KeyError: 'shape'",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_and_an_older_one_offered(damage: Callable[[Path], None], tmp_path: Path) -> None:
    paths = small_run(tmp_path, 10, 20, 30)
    truncate(paths[1])  # the one before is no good either
    damage(paths[2])
    for asked in (tmp_path, paths[2]):
        with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
            checkpoint.find(asked)
        assert f"An older complete checkpoint is {paths[0]}" in str(caught.value)
    assert checkpoint.find(paths[0]) == paths[0]

    def rank(comm: Communicator) -> str:
        with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
            checkpoint.verify(paths[2], comm)
        return str(caught.value)

    assert len(set(run_ranks(3, rank))) == 1


def test_a_flipped_byte_in_any_file_is_found_by_all_ranks(tmp_path: Path) -> None:
    (path,) = small_run(tmp_path, 10, num_ranks=4)
    run_ranks(3, lambda comm: checkpoint.verify(path, comm))

    def rank(comm: Communicator, name: str) -> str:
        with pytest.raises(CheckpointError, match=rf"{name} was altered.*no older complete checkpoint") as caught:
            checkpoint.verify(path, comm)
        return str(caught.value)

    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        intact = file.read_bytes()
        file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        assert checkpoint.find(tmp_path) == path  # sizes alone do not show it
        for num_ranks in (1, 3, 6):
            assert len(set(run_ranks(num_ranks, lambda comm, name=file.name: rank(comm, name)))) == 1
        file.write_bytes(intact)


def test_a_file_damaged_after_the_check_is_still_an_error(tmp_path: Path) -> None:
    """Damage between `find` and `load`: a header that is no header, and a file of another checkpoint."""
    first, second = small_run(tmp_path, 10, 20)
    source = CheckpointSource(second)
    (second / "rank-00001.safetensors").write_bytes(b"\xff" * 300)
    with pytest.raises(CheckpointError, match=rf"rank-00001\.safetensors cannot be read.*{first.name}"):
        source.read("cut", (slice(0, 6), slice(0, 4)))
    np.testing.assert_array_equal(source.read("cut", (slice(0, 3), slice(1, 2))), np.full((3, 1), 20))  # only the other file is needed


# ---- failures while saving


@pytest.mark.parametrize("where", ["rank-00001.safetensors", "manifest.json", "rename"])
def test_full_disk_leaves_what_was_there(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path, 10, 20, num_ranks=4)
    before = contents(tmp_path)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    open_, rename = Path.open, Path.rename

    def full_open(path: Path, mode: str = "r", **options: Any) -> Any:
        stream = open_(path, mode, **options)
        if path.name != where or "w" not in mode:
            return stream
        stream.write("half" if "b" not in mode else b"half")
        stream.close()
        raise error

    def full_rename(path: Path, target: Path) -> Path:
        if where == "rename" and path.name.startswith(".tmp-"):
            raise error
        return rename(path, target)

    def rank(comm: Communicator) -> str:
        with pytest.raises(CheckpointError, match=r"step-00000020 could not be written: rank [01]: No space left on device") as caught:
            small_save(comm, tmp_path, 20, 5.0, keep=1)
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_open)
        patch.setattr(Path, "rename", full_rename)
        messages = run_ranks(4, rank)
    assert len(set(messages)) == 1
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    small_run(tmp_path, 30, num_ranks=4)
    assert checkpoint.find(tmp_path).name == "step-00000030"


def test_several_failing_ranks_make_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, blocks: Any) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(save_module, "write_safetensors", fails)

    def rank(comm: Communicator) -> str:
        with pytest.raises(CheckpointError, match=r"rank 0 \(and 2 more ranks\).*rank-00000\.safetensors") as caught:
            small_save(comm, tmp_path, 1)
        return str(caught.value)

    assert len(set(run_ranks(3, rank))) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def rank(comm: Communicator) -> str:
        with pytest.raises(CheckpointError, match=r"could not be written: rank 0.*folder that all ranks can write to") as caught:
            small_save(comm, tmp_path / "file" / "run", 1)
        return str(caught.value)

    assert len(set(run_ranks(2, rank))) == 1


def test_ranks_that_disagree_about_shards_are_found(tmp_path: Path) -> None:
    def rank(comm: Communicator) -> None:
        mesh = MeshShape(pp=2)
        tensors = [StateTensor("x", ShardSpec.replicated(2), np.zeros(2))]  # both stages claim it
        with pytest.raises(CheckpointError, match="disagree about who holds what: the pieces of x have 4 elements"):
            save(tmp_path, world=comm, mesh_shape=mesh, coords=mesh.coords(comm.rank), tensors=tensors, meta={}, step=1, keep=1)

    run_ranks(2, rank)
    assert not list(tmp_path.iterdir())


# ---- what is kept


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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
    assert names(path) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert np.all(CheckpointSource(path).read("whole", (slice(0, 3),)) == 0.5)


def test_a_replacement_that_died_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    _, path = small_run(tmp_path, 6, 7)
    aside = path.rename(tmp_path / f".old-{path.name}")
    (tmp_path / f".tmp-{path.name}").mkdir()
    assert checkpoint.find(tmp_path) == aside
    small_run(tmp_path, 8)
    assert names(tmp_path) == ["step-00000006", "step-00000007", "step-00000008"]


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    small_run(tmp_path, 1)
    for name in (".tmp-step-00000002", ".tmp-step-00000009"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".old-step-00000001")
    (tmp_path / "metrics.jsonl").write_text("{}")
    small_run(tmp_path, 2)
    assert names(tmp_path) == ["metrics.jsonl", "step-00000001", "step-00000002"]


def test_later_steps_of_an_abandoned_course_are_set_aside(tmp_path: Path) -> None:
    small_run(tmp_path, 10, 20, 30)
    small_run(tmp_path, 15, keep=1)  # resumed from 10
    assert names(tmp_path) == ["left-step-00000020", "left-step-00000030", "step-00000015"]
    assert checkpoint.find(tmp_path).name == "step-00000015"
    assert checkpoint.find(tmp_path / "left-step-00000030").name == "left-step-00000030"


# ---- the numeric key


def test_numeric_key_is_json_and_the_same_on_all_ranks() -> None:
    config = make_config("gpt2", WIDE, **TINY)
    keys = run_ranks(8, lambda comm: checkpoint.numeric_key(config, comm, shared_by=1), nodes=[0, 0, 0, 0, 0, 1, 1, 1])
    assert all(key == keys[0] for key in keys)
    assert json.loads(json.dumps(keys[0])) == keys[0]
    assert keys[0]["ranks_per_host"] == [5, 3]
    assert keys[0]["mesh"] == "dp 2 x tp 2 x pp 2"
    assert keys[0]["kernels"]["attention_forward"]
    assert keys[0]["blas"] != ""


def test_difference_names_what_changed() -> None:
    def key(layout: Layout, **changes: Any) -> dict[str, Any]:
        config = make_config("gpt2", layout, **(TINY | changes))
        return run_ranks(layout.num_ranks, lambda comm: checkpoint.numeric_key(config, comm, shared_by=1))[0]

    old = key(Layout(dp=2))
    assert checkpoint.difference(old, key(Layout(dp=2))) is None
    assert checkpoint.difference(old, key(Layout(dp=2), bucket_mb=1.0)) == "bucket mb 1.0 (was 0.004)"
    assert checkpoint.difference(old, key(Layout(dp=2), recompute="full")) == "recompute full (was none)"
    halves = checkpoint.difference(old, key(with_layout(Layout(dp=2), num_microbatches=2)))
    assert halves == "microbatch 2 (was 4), num microbatches 2 (was 1)"
    moved = checkpoint.difference(old, key(Layout(tp=2)))
    assert moved is not None
    assert moved.startswith("mesh dp 1 x tp 2 x pp 1 (was dp 2 x tp 1 x pp 1)")
    other = old | {"kernels": old["kernels"] | {"matmul": "cuda:wmma"}, "threads": [1, 2]}
    line = checkpoint.difference(old, other)
    assert line is not None
    assert "kernels.matmul cuda:wmma (was numpy:" in line
    assert "\n" not in line
    unknown = checkpoint.difference({}, old)
    assert unknown is not None
    assert "(was unknown)" in unknown
    assert "more" in unknown
