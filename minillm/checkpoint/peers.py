"""State that ranks hold in memory as a source: blocks go from those that have them to the others.

The ranks that are left after a loss fill a smaller mesh from it without any file. Of replicas one
sends; a rank that holds a block already gets none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from minillm.base.arrays import dtype_name, to_host
from minillm.base.errors import CheckpointError
from minillm.checkpoint.manifest import Bounds
from minillm.checkpoint.part import Part
from minillm.checkpoint.source import overlap_of, relative
from minillm.comm.communicator import Communicator
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Slices, slice_shape
from minillm.params.state import StateTensor


@dataclass
class HeldTensor:
    """Blocks of a global tensor on this rank, by their bounds."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name
    blocks: dict[Bounds, np.ndarray] = field(default_factory=dict)


Held: TypeAlias = dict[str, HeldTensor]
"""Name of a tensor -> what this rank holds of it."""


def held(
    tensors: Iterable[StateTensor],
    mesh: MeshShape,
    coords: Mapping[str, int],
    *,
    copy: bool = False,
) -> Held:
    """Return the blocks of `tensors` on the rank at `coords`, views unless `copy`."""
    found: Held = {}
    for tensor in tensors:
        entry = found.setdefault(
            tensor.name, HeldTensor(tensor.spec.shape, dtype_name(tensor.data.dtype))
        )
        for globally, locally in tensor.spec.pieces(mesh, coords):
            block = to_host(tensor.data[locally]).reshape(slice_shape(globally))
            entry.blocks[_bounds(globally)] = block.copy() if copy else block
    return found


class PeerSource:
    """Tensors from the memory of ranks. Implements `StateSource` for the blocks held here."""

    def __init__(self, tensors: Held) -> None:
        self.tensors = tensors

    def __str__(self) -> str:
        return "the memory of the ranks"

    def names(self) -> list[str]:
        """Return the names of all tensors held here."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of `name`."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype."""
        return self.tensors[name].dtype

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """Return a new array, assembled from the blocks held here."""
        entry, filled = self.tensors[name], 0
        out = np.empty(slice_shape(global_slices), np.dtype(entry.dtype))
        for bounds, block in entry.blocks.items():
            common = overlap_of(global_slices, bounds)
            if common is not None:
                target = relative(common, [part.start for part in global_slices])
                out[target] = block[relative(common, [first for first, _ in bounds])]
                filled += math.prod(slice_shape(common))
        if filled != out.size:
            raise CheckpointError(f"{filled} of {out.size} elements of {name} are in memory")
        return out


def newest(
    world: Communicator,
    states: Mapping[int, Held],
    wanted: Sequence[StateTensor],
    mesh: MeshShape,
    coords: Mapping[str, int] | None,
) -> tuple[int, PeerSource] | None:
    """Return the newest step whose whole state the ranks hold together, and a source of it.

    `states` are those of this rank by step. It wants `wanted` at `coords`, nothing if those are
    None. None if the state of no step is whole. Collective over `world`.
    """
    needs: dict[str, list[Bounds]] = {}
    if coords is not None:
        for tensor in wanted:
            needs.setdefault(tensor.name, []).extend(
                _bounds(globally) for globally, _ in tensor.spec.pieces(mesh, coords)
            )
    everyone = _listings(world, states, needs)
    found = _newest_whole(everyone, {name for rank in everyone for name in rank.needs})
    if found is None:
        return None
    step, has = found
    needed = [rank.needs for rank in everyone]
    return step, PeerSource(_exchanged(world, states.get(step, {}), has, needed))


def newest_part(
    world: Communicator, states: Mapping[int, Held], names: Iterable[str]
) -> tuple[int, Part] | None:
    """Return the newest step whose whole state the ranks hold together, and this rank's part of it.

    `states` are those of this rank by step, `names` all tensors of the state. Of several ranks with
    a block the first writes it. None if the state of no step is whole. Collective over `world`.
    """
    found = _newest_whole(_listings(world, states, {}), names)
    if found is None:
        return None
    step, has = found
    part = Part([], {})
    for name, tensor in states.get(step, {}).items():
        for bounds, block in tensor.blocks.items():
            if not any(bounds in rank[name][2] for rank in has[: world.rank] if name in rank):
                part.add(name, tensor.shape, tensor.dtype, bounds, block)
    return step, part


def _listings(
    world: Communicator, states: Mapping[int, Held], needs: Mapping[str, list[Bounds]]
) -> list[_Listing]:
    """Return what each rank needs and has. Collective."""
    listing = {
        str(step): {n: [t.shape, t.dtype, list(t.blocks)] for n, t in tensors.items()}
        for step, tensors in states.items()
    }
    return [_Listing(entry) for entry in world.gather_json({"needs": needs, "has": listing})]


def _newest_whole(
    everyone: Sequence[_Listing], names: Iterable[str]
) -> tuple[int, list[_Has]] | None:
    """Return the newest step at which the ranks hold `names` whole, and what each has of it."""
    names = set(names)
    for step in sorted({step for rank in everyone for step in rank.has}, reverse=True):
        has: list[_Has] = [rank.has.get(step, {}) for rank in everyone]
        if all(_is_whole(name, has) for name in names):
            return step, has
    return None


class _Listing:
    """Needs of a rank, name -> bounds, and its blocks: step -> name -> (shape, dtype, bounds)."""

    def __init__(self, entry: Any) -> None:
        self.needs = {name: _hashable(found) for name, found in entry["needs"].items()}
        self.has = {
            int(step): {
                name: (tuple(shape), dtype, _hashable(found))
                for name, (shape, dtype, found) in tensors.items()
            }
            for step, tensors in entry["has"].items()
        }


_Has: TypeAlias = Mapping[str, tuple[tuple[int, ...], str, list[Bounds]]]


def _is_whole(name: str, has: Sequence[_Has]) -> bool:
    """Return True if the blocks of all ranks cover a tensor. Different blocks never overlap."""
    entries = [rank[name] for rank in has if name in rank]
    blocks = {bounds for _, _, found in entries for bounds in found}
    size = sum(math.prod(hi - lo for lo, hi in bounds) for bounds in blocks)
    return bool(entries) and size == math.prod(entries[0][0])


def _exchanged(
    world: Communicator, own: Held, has: Sequence[_Has], needs: Sequence[Mapping[str, list[Bounds]]]
) -> Held:
    """Return `own` with the blocks that this rank needs besides. Collective.

    All ranks walk through the messages in one order, so none waits for ever.
    """
    found = {n: HeldTensor(t.shape, t.dtype, dict(t.blocks)) for n, t in own.items()}
    for name in sorted({name for rank in needs for name in rank}):
        holders: dict[Bounds, list[int]] = {}
        for rank, tensors in enumerate(has):
            for bounds in tensors[name][2] if name in tensors else ():
                holders.setdefault(bounds, []).append(rank)
        shape, dtype, _ = next(tensors[name] for tensors in has if name in tensors)
        for bounds, ranks in sorted(holders.items()):
            for rank, wanted in enumerate(needs):
                if rank in ranks or not _touches(bounds, wanted.get(name, ())):
                    continue
                owner = ranks[rank % len(ranks)]
                if world.rank == owner:
                    world.send(own[name].blocks[bounds], rank)
                elif world.rank == rank:
                    block = np.empty([hi - lo for lo, hi in bounds], np.dtype(dtype))
                    entry = found.setdefault(name, HeldTensor(shape, dtype))
                    entry.blocks[bounds] = world.recv(block, owner)
    return found


def _touches(bounds: Bounds, wanted: Iterable[Bounds]) -> bool:
    slices = tuple(slice(lo, hi) for lo, hi in bounds)
    return any(overlap_of(slices, other) is not None for other in wanted)


def _bounds(slices: Slices) -> Bounds:
    return tuple((int(part.start), int(part.stop)) for part in slices)


def _hashable(found: Iterable[Any]) -> list[Bounds]:
    return [tuple((lo, hi) for lo, hi in bounds) for bounds in found]
