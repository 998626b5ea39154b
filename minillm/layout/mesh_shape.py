"""Mesh shape: named axes, their sizes, and the arithmetic between ranks and coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minillm.base.errors import ConfigError

AXES = ("pp", "dp", "cp", "ep", "tp")
"""From the slowest-varying to the fastest: tensor-parallel ranks, which talk most, are neighbours;
pipeline stages, which talk least, lie farthest apart."""

TOKEN_AXES = ("dp", "ep", "cp")
"""The axes over which the tokens of a batch are spread: dense gradients are summed over them."""

GROUPS: tuple[tuple[str, ...], ...] = (
    *((axis,) for axis in AXES),
    ("dp", "ep"),
    ("dp", "cp"),
    TOKEN_AXES,
    (*TOKEN_AXES, "tp"),
    ("dp", "cp", "tp"),
)
"""The axis combinations that have a communicator."""


@dataclass(frozen=True)
class MeshShape:
    """The sizes of the axes; pure arithmetic, usable without any rank running."""

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
        """The product of all sizes."""
        return self.size(*AXES)

    def size(self, *axes: str) -> int:
        """The number of ranks in a group over `axes`."""
        return math.prod(getattr(self, axis) for axis in axes)

    def coords(self, rank: int) -> dict[str, int]:
        """Axis -> coordinate of a global rank; tp varies fastest."""
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"rank {rank} does not lie in a mesh of {self.num_ranks} ranks")
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def rank(self, coords: Mapping[str, int]) -> int:
        """The global rank at `coords`; axes left out are at 0."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coords.get(axis, 0)
        return rank
