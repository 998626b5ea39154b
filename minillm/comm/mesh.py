"""The mesh: ranks laid out over named axes, and every communicator that a method may ask for, made
once and passed to whoever needs it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.layout.mesh_shape import AXES, GROUPS, MeshShape


class Mesh:
    """One rank's view of the mesh on `comm`, with the communicators of all `GROUPS` and of the tied
    weights' stages.

    `tie_groups` maps a name to the pp coordinates that hold a copy of a tied weight. Collective:
    all ranks of `comm` construct it together. Raises ConfigError if the sizes do not multiply to
    the number of ranks.
    """

    def __init__(
        self,
        comm: Communicator,
        shape: MeshShape,
        tie_groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if shape.num_ranks != comm.size:
            sizes = " x ".join(
                f"{axis} {shape.size(axis)}" for axis in AXES if shape.size(axis) > 1
            )
            raise ConfigError(
                f"a mesh of {sizes or '1 rank'} has {shape.num_ranks} ranks, "
                f"but {comm.size} are running; dp x tp x pp can be {_factorisations(comm.size)}"
            )
        self.shape, self.world = shape, comm
        self.coords = shape.coords(comm.rank)
        self._groups = {axes: self._make_group(comm, axes) for axes in GROUPS}
        self._ties: dict[str, Communicator | None] = {}
        for name, stages in sorted((tie_groups or {}).items()):
            inside = self.coords["pp"] in stages
            self._ties[name] = comm.split(
                self._color(("pp",)) if inside else None, self.coords["pp"], f"tie:{name}"
            )

    def axis(self, *axes: str) -> Communicator:
        """The communicator over `axes`. Raises ConfigError for a combination that has none."""
        if axes not in self._groups:
            declared = ", ".join("+".join(group) for group in self._groups)
            raise ConfigError(
                f"there is no communicator over {'+'.join(axes)}; declared groups: {declared}"
            )
        return self._groups[axes]

    def tie(self, name: str) -> Communicator | None:
        """The communicator of the stages that hold the tied weight `name`; None on other stages.
        Raises ConfigError for an undeclared name."""
        if name not in self._ties:
            raise ConfigError(
                f"no tie group {name!r} was declared; declared: {', '.join(self._ties) or 'none'}"
            )
        return self._ties[name]

    def size(self, *axes: str) -> int:
        """The number of ranks over `axes`."""
        return self.shape.size(*axes)

    def coord(self, axis: str) -> int:
        """This rank's coordinate on `axis`."""
        return self.coords[axis]

    def _make_group(self, comm: Communicator, axes: tuple[str, ...]) -> Communicator:
        """Split off the ranks that differ from this one on `axes` only; a group of one costs
        nothing."""
        name = "+".join(axis for axis in axes if self.size(axis) > 1) or axes[0]
        if self.size(*axes) == 1:
            return SelfCommunicator(name, comm.timeout)
        group = comm.split(self._color(axes), comm.rank, name)
        assert group is not None
        return group

    def _color(self, axes: tuple[str, ...]) -> int:
        return self.shape.rank(
            {axis: index for axis, index in self.coords.items() if axis not in axes}
        )


def _factorisations(number: int, most: int = 12) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    found = [
        (dp, tp, number // (dp * tp))
        for dp, tp in itertools.product(reversed(divisors), divisors)
        if number % (dp * tp) == 0
    ]
    return ", ".join("x".join(map(str, layout)) for layout in found[:most]) + (
        ", ..." if len(found) > most else ""
    )
