"""Data-parallel methods behind one protocol: toy methods prove that no other file knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY, load_trainer, save_trainer, state_pieces
from replication.gradient_server import GradientServer
from replication.sharded_moments import ShardedMoments
from training_helpers import (
    INIT_STD,
    Layout,
    assemble,
    assert_same,
    compare,
    make_batches,
    make_config,
    reference,
    train,
)

from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import FlatShard, Segment, ShardSpec, share, slice_shape
from minillm.tasks.language_model import LanguageModeling
from minillm.training.trainer import Trainer

METHODS = {"server": GradientServer, "sharded": ShardedMoments}
LAYOUTS = [
    Layout(dp=2, num_microbatches=2),
    Layout(dp=3 - 1, tp=2, sp=True),
    Layout(dp=2, pp=2, num_microbatches=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_of_one_file_equals_one_rank(method: str, layout: Layout) -> None:
    found = train("gpt2", layout, optimizer="adamw", options={"replicate": METHODS[method]})
    assert_same(found, reference("gpt2", "adamw"), 1e-9)


def resumed(
    comm: Communicator,
    layout: Layout,
    method: Any,
    start: Path | None,
    end: Path | None,
    first: int,
) -> Any:
    config = make_config("gpt2", layout, **TINY)
    task = LanguageModeling(make_batches(config))
    trainer = Trainer(config, comm, task, std=INIT_STD, replicate=method)
    if start is not None:
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, start)
    losses = [trainer.step(step).loss for step in range(first, first + 2)]
    if end is not None:
        save_trainer(trainer, end, first + 2)
    return losses, state_pieces(trainer)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sharded_state_is_saved_and_resharded(tmp_path: Path, width: int) -> None:
    """Save moments as shares of two ranks, and resume them on one, two and four."""
    two, wide = Layout(dp=2), Layout(dp=width)
    run_ranks(2, lambda comm: resumed(comm, two, ShardedMoments, None, tmp_path, 0))
    path = tmp_path / "step-00000002"
    whole = run_ranks(1, lambda comm: resumed(comm, Layout(), None, None, None, 0))
    assert whole[0][0]  # the reference trains
    expected = run_ranks(1, lambda comm: resumed(comm, Layout(), None, path, None, 2))
    found = run_ranks(width, lambda comm: resumed(comm, wide, ShardedMoments, path, None, 2))
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-12)
    states = (assemble([state for _, state in ranks], 1e-11) for ranks in (found, expected))
    compare(*states, 1e-9, "state")


def test_state_of_a_method_is_saved_and_loaded(tmp_path: Path) -> None:
    layout = Layout(dp=2)
    run_ranks(2, lambda comm: resumed(comm, layout, GradientServer, None, tmp_path, 0))
    path = tmp_path / "step-00000002"
    found = run_ranks(2, lambda comm: resumed(comm, layout, GradientServer, path, None, 2))
    _, pieces = found[0]
    assert pieces["server/updates"][1][0][1].tolist() == [4.0]


SPECS = [
    ShardSpec.replicated(7, 5),
    ShardSpec((12, 5), ((Segment(6, ("tp",)), Segment(6, ("tp",))), (Segment(5),))),
    ShardSpec((5, 12), ((Segment(5),), (Segment(12, ("tp",)),))),
    ShardSpec((7, 3), ((Segment(7, ("tp",)),), (Segment(3),)), pad=True),
    ShardSpec((3, 4, 5), ((Segment(3),), (Segment(4, ("tp",)),), (Segment(5),))),
    ShardSpec.replicated(9),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.shape))
@pytest.mark.parametrize("num_shares", [1, 2, 3, 5])
def test_flat_shares_cover_every_element_once(spec: ShardSpec, num_shares: int) -> None:
    """Check that each rank's flat share holds exactly the elements that its pieces name."""
    mesh = MeshShape(dp=num_shares, tp=2)
    cuts = (0, *(share(160, rank, num_shares, 8).stop for rank in range(num_shares)))
    shard = FlatShard(spec, offset=16, cuts=cuts, axes=("dp", "ep", "cp"))
    whole = np.arange(np.prod(spec.shape)).reshape(spec.shape)
    seen = np.zeros(spec.shape, int)
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        local = np.full(spec.local_shape(mesh), -1)
        for globally, locally in spec.pieces(mesh, coords):
            local[locally] = whole[globally]
        held = local.reshape(-1)[shard.range(mesh, coords)]
        named = np.full(held.shape, -1)
        for globally, locally in shard.pieces(mesh, coords):
            named[locally] = whole[globally].reshape(slice_shape(locally))
            if "tp" in spec.axes or coords["tp"] == 0:
                seen[globally] += 1
        np.testing.assert_array_equal(named, held)
    assert (seen == 1).all()
