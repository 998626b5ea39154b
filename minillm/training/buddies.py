"""Copies of the state that one rank alone holds, in the memory of another: its buddy.

ZeRO cuts the state over the replicas, and without a second replica the shards of tensor and
pipeline parallelism are the only ones. If such a rank is lost, its buddy has its state. The buddy
is on another node if there are several.

1. Before a step each rank sends its blocks that no other rank holds, and receives those of another
   one into the older of two slots (`keep`).
2. All ranks agree on the update of that step, so all copies are complete. Each then copies its own
   state (`commit`), and updates.
3. After a loss all ranks go to the newest step whose state is whole, in use or copied (`states`).

Invariant: at any moment the state of some step is whole without any one rank. Before the agreement
that is the step copied before, from which every rank has its own state; after it, the new one.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from minillm.base.host_memory import size
from minillm.checkpoint.manifest import Bounds
from minillm.checkpoint.peers import Held, HeldTensor, held
from minillm.comm.buffers import chunks
from minillm.comm.work import AllWork
from minillm.training.trainer import Trainer

AXIS = "buddy"  # in the ledger
CHUNK_BYTES = 16 << 20  # of a message: many small blocks travel together

_Listing = dict[str, Any]  # name -> [shape, dtype, bounds of blocks]


def packed(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the bytes of `arrays` in pieces of CHUNK_BYTES, each in the same memory."""
    piece, filled = np.empty(CHUNK_BYTES, np.uint8), 0
    for array in arrays:
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        while left.size:
            part = left[: CHUNK_BYTES - filled]
            piece[filled : filled + part.size] = part
            filled, left = filled + part.size, left[part.size :]
            if filled == CHUNK_BYTES:
                yield piece
                filled = 0
    if filled:
        yield piece[:filled]


class _Slot:
    """Copies of the blocks of a listing at a step, one after another in `flat` [bytes].

    `step` is None while they are not complete.
    """

    def __init__(self, listing: _Listing) -> None:
        self.step: int | None = None
        self.flat = np.empty(_num_bytes(listing), np.uint8)
        self.blocks: Held = {}
        start = 0
        for name, bounds in _keys(listing):
            shape, dtype, _ = listing[name]
            extent = [hi - lo for lo, hi in bounds]
            stop = start + math.prod(extent) * np.dtype(dtype).itemsize
            block = self.flat[start:stop].view(np.dtype(dtype)).reshape(extent)
            entry = self.blocks.setdefault(name, HeldTensor(tuple(shape), dtype))
            entry.blocks[bounds], start = block, stop


class Buddies:
    """Copies for the ranks of a trainer, made every `every` steps. Collective over its ranks."""

    def __init__(self, trainer: Trainer, every: int) -> None:
        self._trainer, self._every = trainer, every
        world = trainer.world
        mine = self._held()
        node = world.split_by_node().gather_json(world.rank)[0]
        everyone = world.gather_json([node, _listing(mine)])
        only = _held_once([listing for _, listing in everyone])
        self.names = sorted({name for _, listing in everyone for name in listing})
        """Names of all tensors of the state, on any rank."""
        self.distance = distance([node for node, _ in everyone])
        self._to = (world.rank + self.distance) % world.size
        source = (world.rank - self.distance) % world.size
        self._from, self._only = source, only[world.rank]
        self.active = world.size > 1 and any(only)
        """False if every block has a copy anyway: replicas are their own buddies."""
        self._comm = world.dup(AXIS) if self.active else world
        self._own = _Slot(_listing(mine) if self.active else {})
        self._new, self._old = (_Slot(only[source] if self.active else {}) for _ in range(2))
        self._elsewhere = everyone[self._to][0] != node

    def keep(self, step: int) -> None:
        """Copy the state of `step` completed steps to the buddy, if a copy is due. Collective.

        Raises PeerFailed if a rank is lost.
        """
        copied = max(
            (slot.step for slot in (self._new, self._old) if slot.step is not None), default=None
        )
        if not self.active or copied == step or (copied is not None and step % self._every):
            return
        self._new, self._old = self._old, self._new
        self._new.step = None
        mine = self._held()
        blocks = (mine[name].blocks[bounds] for name, bounds in _keys(self._only))
        received = chunks(self._new.flat, CHUNK_BYTES) if self._new.flat.size else []
        for into, sent in itertools.zip_longest(received, packed(blocks)):
            works = [] if into is None else [self._comm.irecv(into, self._from)]
            works += [] if sent is None else [self._comm.isend(sent, self._to)]
            AllWork(works).wait()
        self._new.step = step

    def commit(self) -> None:
        """Copy the own state if a new copy has come: all ranks have agreed that theirs has."""
        step = self._new.step
        if step is None or self._own.step == step:
            return
        self._own.step = None
        mine = self._held()
        for name, tensor in self._own.blocks.items():
            for bounds, block in tensor.blocks.items():
                block[...] = mine[name].blocks[bounds]
        self._own.step = step

    def states(self) -> list[tuple[int, Held]]:
        """Return the copies on this rank with their steps."""
        slots = (self._own, self._new, self._old)
        return [(slot.step, slot.blocks) for slot in slots if slot.step is not None]

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends for one copy."""
        return _num_bytes(self._only) if self.active else 0

    @property
    def bytes_held(self) -> int:
        """Bytes of copies on this rank."""
        return sum(slot.flat.nbytes for slot in (self._own, self._new, self._old))

    def describe(self) -> str:
        """Return what is copied where, for the plan. Collective."""
        everyone = self._trainer.world.gather_json(
            [self.bytes_sent, self.bytes_held, self._elsewhere]
        )
        if not self.active:
            return "nothing to copy: every rank's state has a replica"
        sent, memory = (max(entry[i] for entry in everyone) for i in (0, 1))
        when = "every step" if self._every == 1 else f"every {self._every} steps"
        apart = sum(entry[2] for entry in everyone)
        where = "on another node" if apart == len(everyone) else "on the same node"
        if 0 < apart < len(everyone):
            where = f"on another node for {apart} of {len(everyone)}"
        return (
            f"at most {size(sent)} of a rank are copied {when} to the rank "
            f"{self.distance} further, {where}; {size(memory)} of memory for copies"
        )

    def _held(self) -> Held:
        mesh = self._trainer.mesh
        return held(self._trainer.state(), mesh.shape, mesh.coords)


def distance(nodes: Sequence[Any]) -> int:
    """Return how many ranks further a buddy is, on another node for as many ranks as possible.

    nodes[r] is the node of rank r.
    """
    number = len(nodes)

    def together(by: int) -> int:
        return sum(nodes[r] == nodes[(r + by) % number] for r in range(number))

    return min(range(1, number), key=together, default=0)


def merged(states: Iterable[tuple[int, Held]]) -> dict[int, Held]:
    """Return the blocks of `states` by step."""
    found: dict[int, Held] = {}
    for step, blocks in states:
        here = found.setdefault(step, {})
        for name, tensor in blocks.items():
            entry = here.setdefault(name, HeldTensor(tensor.shape, tensor.dtype))
            entry.blocks.update(tensor.blocks)
    return found


def _listing(blocks: Held) -> _Listing:
    return {n: [t.shape, t.dtype, [list(b) for b in t.blocks]] for n, t in blocks.items()}


def _keys(listing: _Listing) -> list[tuple[str, Bounds]]:
    """Return name and bounds of each block, those of wide elements first: all are aligned."""
    entries = sorted(listing.items(), key=lambda entry: -np.dtype(entry[1][1]).itemsize)
    return [(name, _bounds(found)) for name, (_, _, blocks) in entries for found in blocks]


def _bounds(found: Iterable[Sequence[int]]) -> Bounds:
    return tuple((lo, hi) for lo, hi in found)


def _held_once(listings: Sequence[_Listing]) -> list[_Listing]:
    """Return of each rank's listing the blocks that no other rank holds."""
    times = Counter(key for listing in listings for key in _keys(listing))
    found: list[_Listing] = []
    for listing in listings:
        alone = {
            name: [shape, dtype, [b for b in blocks if times[name, _bounds(b)] == 1]]
            for name, (shape, dtype, blocks) in listing.items()
        }
        found.append({name: entry for name, entry in alone.items() if entry[2]})
    return found


def _num_bytes(listing: _Listing) -> int:
    return sum(
        math.prod(hi - lo for lo, hi in bounds) * np.dtype(dtype).itemsize
        for _, dtype, blocks in listing.values()
        for bounds in blocks
    )
