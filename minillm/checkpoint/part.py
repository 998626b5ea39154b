"""Part of a checkpoint that one rank writes: exactly one rank writes each piece of a tensor."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.base.arrays import dtype_name, on_host, to_host
from minillm.base.errors import CheckpointError
from minillm.checkpoint.manifest import Bounds
from minillm.checkpoint.tensor_file import Block
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Sharded, Slices
from minillm.params.state import StateTensor


@dataclass(frozen=True)
class Part:
    """Blocks of one rank's file, and their entries in the manifest as JSON values."""

    blocks: list[Block]
    tensors: dict[str, Any]

    def add(self, name: str, shape: tuple[int, ...], dtype: str, bounds: Bounds, data: Any) -> None:
        """Add the piece `bounds` of the tensor `name`, whose global shape is `shape`."""
        extent = tuple(hi - lo for lo, hi in bounds)
        key = name
        if extent != shape:
            key += f"[{','.join(f'{lo}:{hi}' for lo, hi in bounds)}]"
        self.blocks.append((key, dtype, data.reshape(extent)))
        entry = self.tensors.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
        entry["pieces"].append([bounds, key])

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(data.nbytes for _, _, data in self.blocks)

    def copied(self) -> Part:
        """Return the part with blocks in host memory that no later step changes.

        Raises CheckpointError if memory does not suffice.
        """
        try:
            blocks = [(key, dtype, _copy(data)) for key, dtype, data in self.blocks]
        except MemoryError:
            raise CheckpointError(
                f"there is no memory for a copy of {self.num_bytes / 1e6:.0f} MB; leave "
                "--save-async out"
            ) from None
        return Part(blocks, self.tensors)


def own_part(tensors: Sequence[StateTensor], mesh: MeshShape, coords: Mapping[str, int]) -> Part:
    """Return the part of the rank at `coords`: views of its arrays where pieces are contiguous."""
    part = Part([], {})
    holders: dict[tuple[Sharded, int], dict[Bounds, list[int]]] = {}
    for tensor in tensors:
        if not tensor.owned:
            continue
        dtype = dtype_name(tensor.data.dtype)
        for global_slices, local_slices in own_pieces(tensor, mesh, coords, holders):
            bounds, data = _bounds(global_slices), tensor.data[local_slices]
            part.add(tensor.name, tensor.spec.shape, dtype, bounds, data)
    return part


def own_pieces(
    tensor: StateTensor,
    mesh: MeshShape,
    coords: Mapping[str, int],
    holders: dict[tuple[Sharded, int], dict[Bounds, list[int]]],
) -> list[tuple[Slices, Slices]]:
    """Return the pieces (global slices, local slices) of a tensor that the rank at `coords` writes.

    Each rank computes the holders of every piece of its stage. A hash of the tensor's name picks
    one of them, so replicas share the work without messages. The first one writes a tensor that
    differs between replicas. `holders` caches the result per spec
    and stage, because many tensors have the same spec.
    """
    me, stage, spec = mesh.rank(coords), coords["pp"], tensor.spec
    if (spec, stage) not in holders:
        holders[spec, stage] = _holders(spec, mesh, stage)
    found = holders[spec, stage]
    number = 0 if tensor.differs else zlib.crc32(tensor.name.encode())
    chosen = {bounds: ranks[number % len(ranks)] for bounds, ranks in found.items()}
    return [piece for piece in spec.pieces(mesh, coords) if chosen[_bounds(piece[0])] == me]


def _holders(spec: Sharded, mesh: MeshShape, stage: int) -> dict[Bounds, list[int]]:
    """Return the ranks of the stage that hold each piece, ascending."""
    found: dict[Bounds, list[int]] = {}
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        if coords["pp"] == stage:
            for global_slices, _ in spec.pieces(mesh, coords):
                found.setdefault(_bounds(global_slices), []).append(rank)
    return found


def _bounds(slices: Slices) -> Bounds:
    return tuple((part.start, part.stop) for part in slices)


def _copy(data: Any) -> np.ndarray:
    """Return a contiguous copy in host memory."""
    return np.array(data, order="C") if on_host(data) else to_host(data)
