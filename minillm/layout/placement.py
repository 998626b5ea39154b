"""Layout of a model over the ranks: stages, their layers, their ranks, and tied weights.

A `Layout` is a plain value. It needs no running ranks and allocates nothing, so the memory
prediction, the numeric key, the checkpoint and the mesh all read the same facts from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minillm.base.errors import ConfigError
from minillm.layout.mesh_shape import MeshShape


@dataclass(frozen=True)
class Layout:
    """Placement of a model's stages on the pp axis of a mesh.

    A pp rank may hold several stages: an interleaved schedule places stage s on rank s mod p, a V
    schedule places stages r and 2p - 1 - r on rank r.
    """

    mesh: MeshShape
    layers_of_stage: tuple[range, ...]  # the blocks of each stage
    rank_of_stage: tuple[int, ...]  # pp coordinate of each stage
    ties: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tied weight -> stages that hold a copy, ascending. The first one owns it."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless every pp rank has a stage and every stage has a pp rank."""
        if len(self.rank_of_stage) != self.num_stages or set(self.rank_of_stage) != set(
            range(self.mesh.pp)
        ):
            raise ConfigError(
                f"{self.num_stages} stages on pp ranks {list(self.rank_of_stage)} do not use each "
                f"of {self.mesh.pp} pp ranks"
            )

    @property
    def num_stages(self) -> int:
        """Pipeline stages in all, at least one a pp rank."""
        return len(self.layers_of_stage)

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """Return the stages on a pp rank, ascending."""
        return tuple(s for s, rank in enumerate(self.rank_of_stage) if rank == pp_rank)

    def ranks_of_tie(self, name: str) -> tuple[int, ...]:
        """Return the pp ranks that hold a copy of the tied weight, ascending, each once."""
        return tuple(sorted({self.rank_of_stage[stage] for stage in self.ties[name]}))

    def owns(self, stage: int, tie: str | None) -> bool:
        """Return whether `stage` holds the copy that counts in norms and is written to disk."""
        return tie is None or self.ties[tie][0] == stage

    @property
    def tied_stages(self) -> frozenset[int]:
        """The stages that hold a copy of any tied weight."""
        return frozenset(itertools.chain.from_iterable(self.ties.values()))


def consecutive(sizes: Sequence[int]) -> tuple[range, ...]:
    """Cut layers into stages of the given sizes: (1, 3) -> range(0, 1), range(1, 4)."""
    stops = itertools.accumulate(sizes)
    return tuple(range(stop - size, stop) for stop, size in zip(stops, sizes, strict=True))
