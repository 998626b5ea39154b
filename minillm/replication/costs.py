"""Terms of the closed formulas of the data axis: bytes sent and bytes held by one rank.

The formulas stand beside the methods (`sends` and `holds` of method.py). They are functions of the
flat layout of a rank's stages, the mesh and the options, and need no running ranks. The ledger
counts the same bytes (comm/ledger.py), and the tests hold it to the formulas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minillm.comm.buffers import even_counts
from minillm.layout.flat import FlatLayout, Run
from minillm.layout.mesh_shape import AXES, TOKEN_AXES, MeshShape
from minillm.layout.sharding import overlap
from minillm.replication.options import ReplicationOptions

Bytes = Counter[tuple[str, str]]
"""(axis, operation) -> bytes, as the ledger counts them on one rank."""


@dataclass(frozen=True, kw_only=True)
class DataAxis:
    """Part of one rank in a data-parallel method."""

    layouts: Sequence[FlatLayout[Any]]  # of the stages of the rank
    mesh: MeshShape
    options: ReplicationOptions
    item: int  # bytes of a weight
    wide: int  # bytes of a gradient
    rank: int  # coordinate on dp
    shared_by: int = 1  # ranks of a node that share one copy of the weights
    nodes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Group that is all-reduced in two levels -> ranks of a node, and place among them."""
    turn: int = 0  # of the exchange, where a method has several in turn
    server: int | None = None
    """Number of this dedicated server; `layouts` are then those of all coordinates on pp and tp."""
    passes: str = "FB"  # forward and backward passes of a stage in a step, in order


class Sizes(NamedTuple):
    """Part of the model that one rank trains."""

    values: int  # elements of the flat buffers of its stages
    largest: int  # elements of the largest block
    state: int  # elements of optimizer state, masters included
    whole: int  # elements of the largest parameter that no boundary between shares cuts
    item: int  # bytes of a weight
    wide: int  # bytes of a gradient, a moment and a master
    workers: int  # data-parallel ranks
    on_host: bool  # arrays lie in the host's memory


class Held(NamedTuple):
    """Bytes that a rank holds at the peak of a step. Arrays that ranks share count in full."""

    values: int
    grads: int  # with error memory
    state: int  # of the optimizer and of the method
    messages: int = 0


def common(run: Run[Any], part: slice) -> int:
    """Return the elements of a run within `part`."""
    found = overlap(slice(run.start, run.stop), part)
    return found.stop - found.start


def add_sum(found: Bytes, axis: DataAxis, axes: Sequence[str], size: int) -> None:
    """Count an all-reduce of `size` elements over `axes`, in two levels where nodes allow it.

    A direct one of n bytes sends 2 n (d - 1) / d of them. Two levels of N nodes of q ranks send
    2 n (q - 1) / q within a node, and of a part p of n / q bytes 2 p (N - 1) / N between nodes.
    """
    name, count = _group(axis.mesh, axes), size * axis.wide
    if name not in axis.nodes:
        add(found, axis.mesh, axes, "all_reduce", count)
        return
    ways, place = axis.nodes[name]
    found[f"{name} in node", "reduce_scatter"] += count
    found[f"{name} in node", "all_gather"] += count
    found[f"{name} between nodes", "all_reduce"] += even_counts(size, ways)[place] * axis.wide


def add(found: Bytes, mesh: MeshShape, axes: Sequence[str], operation: str, count: int) -> None:
    """Count an operation over `axes`. A group of one rank moves nothing."""
    if name := _group(mesh, axes):
        found[name, operation] += count


def _group(mesh: MeshShape, axes: Sequence[str]) -> str:
    """Return the name of the group over `axes`, empty if it has one rank."""
    live = [axis for axis in (*TOKEN_AXES, *AXES) if axis in axes and mesh.size(axis) > 1]
    return "+".join(dict.fromkeys(live))
