"""Sharded arrays: exactly one rank of each replica group holds an element.

This holds for every mesh and every cut of the array.
"""

import itertools
import math

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.layout.mesh_shape import AXES, MeshShape
from minillm.layout.sharding import Segment, ShardSpec, slice_shape

MESHES = [
    MeshShape(),
    MeshShape(tp=2),
    MeshShape(tp=4, dp=2),
    MeshShape(pp=2, dp=3, tp=2),
    MeshShape(ep=2, tp=3),
    MeshShape(dp=2, cp=2, ep=2, tp=2),
]
SPECS = {
    "replicated": ShardSpec.replicated(5, 3),
    "vector": ShardSpec((12,), ((Segment(12, ("tp",)),),)),
    "columns": ShardSpec((12, 5), ((Segment(12, ("tp",)),), (Segment(5),))),
    "rows": ShardSpec((5, 24), ((Segment(5),), (Segment(24, ("tp",)),))),
    "two axes": ShardSpec((24, 4), ((Segment(24, ("ep", "tp")),), (Segment(4),)), pad=True),
    "both dims": ShardSpec((12, 12), ((Segment(12, ("tp",)),), (Segment(12, ("dp",)),))),
    "fused qkv": ShardSpec(
        (60, 3),
        (
            (Segment(36, ("tp",), 3), Segment(12, ("tp",), 1), Segment(12, ("tp",), 1)),
            (Segment(3),),
        ),
    ),
    "cut and whole": ShardSpec((16,), ((Segment(12, ("tp",)), Segment(4)),)),
    "vocabulary 29": ShardSpec((29, 4), ((Segment(29, ("tp",)),), (Segment(4),)), pad=True),
    "vocabulary 1": ShardSpec((1, 2), ((Segment(1, ("tp",)),), (Segment(2),)), pad=True),
    "padded units": ShardSpec((21,), ((Segment(21, ("tp",), 3),),), pad=True),
    "scalar": ShardSpec.replicated(),
}


def mesh_name(mesh: MeshShape) -> str:
    return "".join(f"{axis}{mesh.size(axis)}" for axis in AXES if mesh.size(axis) > 1) or "one"


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
@pytest.mark.parametrize("name", SPECS)
def test_pieces_cover_each_element_once_per_replica(name: str, mesh: MeshShape) -> None:
    spec = SPECS[name]
    whole = np.arange(math.prod(spec.shape), dtype=np.int64).reshape(spec.shape)
    replicas: dict[tuple[int, ...], np.ndarray] = {}
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        local = np.full(spec.local_shape(mesh), -1)
        replica = tuple(coords[axis] for axis in AXES if axis not in spec.axes)
        held = replicas.setdefault(replica, np.zeros(spec.shape, np.int64))
        seen_here = np.zeros(spec.shape, np.int64)
        for global_slices, local_slices in spec.pieces(mesh, coords):
            assert slice_shape(global_slices) == slice_shape(local_slices)
            assert math.prod(slice_shape(global_slices)) > 0
            assert np.all(local[local_slices] == -1), "two pieces share a place in the local array"
            local[local_slices] = whole[global_slices]
            seen_here[global_slices] += 1
        assert seen_here.max(initial=0) <= 1
        held += seen_here
        assert spec.pad or np.all(local >= 0), "an element of the local array belongs to nothing"
        assert (local >= 0).sum() == seen_here.sum()
    for held in replicas.values():
        if name == "cut and whole":  # the whole segment is on every rank of tp
            assert np.all(held[:12] == 1)
            assert np.all(held[12:] == mesh.tp)
        else:
            assert np.all(held == 1)


@pytest.mark.parametrize(("vocab", "tp"), [(29, 4), (29, 8), (3, 8), (8, 8), (1, 2), (50257, 8)])
def test_vocabulary_padding_lies_at_the_end_of_the_last_ranks(vocab: int, tp: int) -> None:
    mesh, spec = MeshShape(tp=tp), ShardSpec((vocab,), ((Segment(vocab, ("tp",)),),), pad=True)
    each = spec.local_shape(mesh)[0]
    assert each == math.ceil(vocab / tp)
    next_row = 0
    for rank in range(tp):
        pieces = list(spec.pieces(mesh, mesh.coords(rank)))
        assert len(pieces) <= 1
        for (global_slice,), (local_slice,) in pieces:
            assert global_slice.start == next_row == rank * each
            assert local_slice.start == 0
            next_row = global_slice.stop
    assert next_row == vocab


def test_fused_segments_give_each_rank_its_part_of_each() -> None:
    """Check that each of two ranks gets whole heads, in the order q, k, v.

    The queries have 4 heads, keys and values 2, and the head width is 3.
    """
    spec = ShardSpec(
        (24,), ((Segment(12, ("tp",), 3), Segment(6, ("tp",), 3), Segment(6, ("tp",), 3)),)
    )
    mesh, whole = MeshShape(tp=2), np.arange(24)
    for rank, expected in enumerate(
        [
            [*range(6), *range(12, 15), *range(18, 21)],
            [*range(6, 12), *range(15, 18), *range(21, 24)],
        ]
    ):
        local = np.full(spec.local_shape(mesh), -1)
        for global_slices, local_slices in spec.pieces(mesh, mesh.coords(rank)):
            local[local_slices] = whole[global_slices]
        assert local.tolist() == expected


def test_padding_of_one_segment_does_not_move_the_next() -> None:
    """Check that the local layout is the same on all ranks.

    This includes ranks whose part of a padded segment is short or empty.
    """
    spec, mesh = ShardSpec((9,), ((Segment(5, ("tp",)), Segment(4)),), pad=True), MeshShape(tp=4)
    assert spec.local_shape(mesh) == (6,)
    for rank in range(4):
        pieces = list(spec.pieces(mesh, mesh.coords(rank)))
        assert pieces[-1] == ((slice(5, 9),), (slice(2, 6),))
        assert len(pieces) == (2 if rank < 3 else 1)


def test_two_axes_count_the_later_one_faster() -> None:
    spec, mesh = ShardSpec((12,), ((Segment(12, ("ep", "tp")),),)), MeshShape(ep=2, tp=3)
    starts = {
        (ep, tp): next(spec.pieces(mesh, {"ep": ep, "tp": tp}))[0][0].start
        for ep, tp in itertools.product(range(mesh.ep), range(mesh.tp))
    }
    assert starts == {(ep, tp): 2 * (3 * ep + tp) for ep, tp in starts}


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 units of 8 in shape .32,. cannot be cut into 3"):
        ShardSpec((32,), ((Segment(32, ("tp",), 8),),)).local_shape(MeshShape(tp=3))
    with pytest.raises(ConfigError):
        list(ShardSpec((7,), ((Segment(7, ("tp",)),),)).pieces(MeshShape(tp=2), {"tp": 0}))
    with pytest.raises(ValueError, match="do not add up"):
        ShardSpec((7,), ((Segment(3), Segment(3)),))


def test_axes_are_those_of_all_segments() -> None:
    assert SPECS["both dims"].axes == {"dp", "tp"}
    assert SPECS["replicated"].axes == frozenset()
