"""Mesh shape: named axes, their sizes, and the arithmetic between ranks and coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minillm.base.errors import ConfigError

AXES = ("pp", "dp", "cp", "ep", "tp")
"""Axes from the slowest-varying to the fastest.

Tensor-parallel ranks communicate most and are neighbours. Pipeline stages communicate least and are
farthest apart.
"""

TOKEN_AXES = ("dp", "ep", "cp")
"""Axes that share the tokens of a batch: dense gradients are summed over them."""

GROUPS: tuple[tuple[str, ...], ...] = (
    *((axis,) for axis in AXES),
    ("dp", "ep"),
    ("dp", "cp"),
    TOKEN_AXES,
    (*TOKEN_AXES, "tp"),
    ("dp", "cp", "tp"),
    ("pp", "tp"),
)
"""Axis combinations that have a communicator."""


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes: tensor (tp), pipeline (pp), data (dp), context (cp), expert (ep)."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ConfigError(
                    f"mesh axis {axis} has size {self.size(axis)}; every axis has at least one rank"
                )

    @property
    def num_ranks(self) -> int:
        """Number of ranks: the product of all sizes."""
        return self.size(*AXES)

    def size(self, *axes: str) -> int:
        """Return the number of ranks in a group over `axes`."""
        return math.prod(getattr(self, axis) for axis in axes)

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinates of a global rank by axis. Raises ConfigError beyond the mesh."""
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"rank {rank} does not lie in a mesh of {self.num_ranks} ranks")
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def rank(self, coords: Mapping[str, int]) -> int:
        """Return the global rank at `coords`; absent axes are 0."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coords.get(axis, 0)
        return rank
