"""Mesh of ranks over named axes, with every communicator that a method may ask for.

Communicators are made once and passed to whoever needs them: no global state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.layout.mesh_shape import AXES, GROUPS, MeshShape


class Mesh:
    """One rank's view of the mesh on `comm`, with the communicators of all `GROUPS`.

    `ties` maps a tied weight to the pp coordinates that hold a copy. Collective: all ranks of
    `comm` construct it together. Raises ConfigError if the sizes do not multiply to the number of
    ranks.
    """

    def __init__(
        self,
        comm: Communicator,
        shape: MeshShape,
        ties: Mapping[str, Sequence[int]] | None = None,
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
        # Axes of size 1 add no ranks: combinations with equal longer axes share a communicator.
        made: dict[tuple[str, ...], Communicator] = {}
        self._groups: dict[frozenset[str], Communicator] = {}
        for axes in GROUPS:
            live = tuple(axis for axis in axes if self.size(axis) > 1)
            if live not in made:
                made[live] = self._make_group(comm, live or axes)
            self._groups[frozenset(axes)] = made[live]
        self._ties: dict[str, Communicator | None] = {}
        for name, ranks in sorted((ties or {}).items()):
            inside = self.coords["pp"] in ranks
            self._ties[name] = comm.split(
                self._color(("pp",)) if inside else None, self.coords["pp"], f"tie:{name}"
            )

    def axis(self, *axes: str) -> Communicator:
        """Return the communicator over `axes`, in any order.

        Raises ConfigError for a combination that has none.
        """
        found = self._groups.get(frozenset(axes))
        if found is None:
            declared = ", ".join("+".join(group) for group in GROUPS)
            raise ConfigError(
                f"there is no communicator over {'+'.join(axes)}; declared groups: {declared}"
            )
        return found

    def tie(self, name: str) -> Communicator | None:
        """Return the communicator of the pp ranks that hold the tied weight `name`, None elsewhere.

        Raises ConfigError for an undeclared name.
        """
        if name not in self._ties:
            raise ConfigError(
                f"no tie group {name!r} was declared; declared: {', '.join(self._ties) or 'none'}"
            )
        return self._ties[name]

    def size(self, *axes: str) -> int:
        """Return the number of ranks over `axes`."""
        return self.shape.size(*axes)

    def coord(self, axis: str) -> int:
        """Return this rank's coordinate on `axis`."""
        return self.coords[axis]

    def _make_group(self, comm: Communicator, axes: tuple[str, ...]) -> Communicator:
        """Split off the ranks that differ from this one on `axes` only."""
        if self.size(*axes) == 1:
            return SelfCommunicator(axes[0], comm.timeout)
        group = comm.split(self._color(axes), comm.rank, "+".join(axes))
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
