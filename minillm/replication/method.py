"""Record of a data-parallel method: what can be said before any rank runs, and how to make it.

Each method fills one in beside its code, and methods.py lists them. Plan, memory prediction,
numeric key and comparison read the record, so they name no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minillm.base.device import CPU, Device
from minillm.base.record import flag
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.layout.flat import FlatLayout
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.placement import Layout
from minillm.replication.costs import Bytes, DataAxis, Held, Sizes
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Replication


class Setting(NamedTuple):
    """Ingredients of a method. `num_values` are the parameters of this rank."""

    mesh: Mesh
    layout: Layout
    options: ReplicationOptions
    num_values: int
    dtype: np.dtype
    device: Device = CPU
    seed: int = 0  # of methods that draw numbers
    wire: Communicator | None = None  # to dedicated servers

    @property
    def bucket_bytes(self) -> int:
        """Size of the pieces in which gradients are reduced."""
        return int(self.options.bucket_mb * 1e6)


class Extent(NamedTuple):
    """Sizes of a comparison, by which a row may set its options."""

    steps: int
    batch: int
    ranks: int
    replica: int  # ranks of a replica: tp x pp


def whole(sizes: Sizes, options: ReplicationOptions) -> Held:
    """Return the bytes of a rank that holds everything for itself."""
    grads = sizes.values * sizes.wide
    return Held(sizes.values * sizes.item, grads, sizes.state * sizes.wide)


def saved(sizes: Sizes, options: ReplicationOptions) -> int:
    """Return the bytes that a rank writes into a checkpoint at most, if the ranks share the work.

    A hash of their names deals the tensors, at worst unevenly by the largest block.
    """
    each = sizes.item + sizes.wide * sizes.state / max(1, sizes.values)
    whole = sizes.values * each
    return round(min(whole, whole / sizes.workers + sizes.largest * each))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Data-parallel method as data. Functions take the options of the run.

    A method is asked for if `option` has a value that is not in `unasked`.
    """

    name: str
    option: str | None
    make: Callable[[Setting], Replication]
    """Make the method. Collective over the mesh; raises ConfigError on every rank."""
    sends: Callable[[DataAxis, FlatLayout[Any]], Bytes]
    """Bytes of one exchange for a stage, as the ledger counts them on one rank. Rows of tensor and
    pipeline parallelism are left out, except the partial sums that an all-reduce joins."""
    meets: Callable[[DataAxis, FlatLayout[Any]], Bytes] = lambda axis, layout: Bytes()
    """Bytes of a meeting of all replicas, likewise."""
    holds: Callable[[Sizes, ReplicationOptions], Held] = whole
    saves: Callable[[Sizes, ReplicationOptions], int] = saved
    """Bytes that a rank writes into a checkpoint, of parameters that train."""
    cuts: Callable[[ReplicationOptions, int], int] = lambda options, workers: 1
    """Number of the ranks, out of all workers, that a frozen parameter is cut over."""
    every: Callable[[ReplicationOptions], int] = lambda options: 1
    """Steps from one exchange to the next."""
    turns: Callable[[ReplicationOptions], int] = lambda options: 1
    """Exchanges after which their bytes repeat; `DataAxis.turn` counts them for `sends`."""
    key: Callable[[ReplicationOptions], dict[str, Any]] = lambda options: {}
    """Part of the numeric key: all that orders and rounds the sums of gradients."""
    equals_one_rank: Callable[[ReplicationOptions, MeshShape], bool] = lambda options, mesh: True
    """True if a mesh computes what one rank computes, up to rounding."""
    workers: Callable[[ReplicationOptions, int], int] = lambda options, dp: 1
    """Number of the workers that update by themselves, out of `dp` replicas."""
    check: Callable[[ReplicationOptions, MeshShape, int], None] = lambda options, mesh, steps: None
    """Raise ConfigError for options that do not fit the mesh, or a run of `steps` steps."""
    uneven: Callable[[ReplicationOptions], bool] = lambda options: False
    """True if replicas may run different numbers of microbatches: --balance speed."""
    placed: Callable[[ReplicationOptions, MeshShape, int], ReplicationOptions] = (
        lambda options, mesh, per_node: options
    )
    """Fill in what follows from several nodes of so many neighbours of the mesh each."""
    lost: Callable[[ReplicationOptions], str] = lambda options: ""
    """Reason why a run cannot go on without lost ranks; empty if it can."""
    copies_suffice: bool = False
    """True if it can with --buddy, which keeps a second copy of all that a rank holds alone."""
    unskippable: Callable[[ReplicationOptions], str] = lambda options: ""
    """Reason why no update of a step can be left out once its loss and norm are known; empty if it
    can: --on-spike."""
    alone: Callable[[Held, ReplicationOptions, int], int] = lambda held, options, dp: (
        held.values + held.state if dp == 1 else 0
    )
    """Bytes of state that one of `dp` ranks on the axis holds and no other."""
    needs_host: Callable[[ReplicationOptions], bool] = lambda options: False
    """True if the method works in the host's memory alone."""
    unasked: tuple[Any, ...] = (0, "none")
    needs: Mapping[str, str] = field(default_factory=dict)
    """Option that means something to this method alone -> beginning of the flag that it needs."""
    goes_with: str = "--tp, --sequence-parallel, --pp, and --node-shared auto or off"
    compared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Row of `minillm compare` -> the options that it sets; functions take the `Extent`."""

    def asked(self, options: ReplicationOptions) -> bool:
        """Return whether the options ask for this method."""
        return self.option is not None and getattr(options, self.option) not in self.unasked

    def flag(self, options: ReplicationOptions) -> str:
        """Return the flag that asks for the method; empty if none does."""
        asked = self.option if self.asked(options) else None
        return f"{flag(asked)} {getattr(options, asked)}" if asked else ""
