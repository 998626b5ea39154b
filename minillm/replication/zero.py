"""ZeRO: optimizer state, gradients and parameters cut over the data-parallel ranks.

Each rank updates its share of every zone of the flat buffers (Rajbhandari et al. 2020,
arXiv:1910.02054; FSDP, Zhao et al. 2023, arXiv:2304.11277). The stages differ in what a rank holds:

1. Optimizer state is sharded. Gradients are reduce-scattered while the last backward pass runs.
   Each rank updates its share, and the parameters are all-gathered.
2. Gradients are sharded as well. Every microbatch is reduce-scattered, and a zone's whole gradient
   lives from its first write to its reduction.
3. Parameters are sharded as well. A block is gathered when it is used (gather.py).

With a shard group of n ranks, n neighbours on the axis share a replica, and the groups all-reduce
their shares of the gradients (hybrid sharding). By default a group is a node where several run.

Invariant: zones are reduced in a fixed order, that of the flat buffer, in stage 3 block by block,
never in the order of readiness. The sum of a share runs in rank order. Tied weights are reduced
after their copies have been summed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minillm import kernels
from minillm.autograd.backward import BackwardObserver
from minillm.base.arrays import Array
from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.comm.two_levels import neighbours
from minillm.layout.flat import FlatLayout, Span
from minillm.layout.mesh_shape import TOKEN_AXES, MeshShape
from minillm.layout.sharding import overlap
from minillm.params.parameter import Parameter, ParamStorage, PlainStorage
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.replication.all_reduce import counted_parts
from minillm.replication.costs import Bytes, DataAxis, Held, Sizes, common
from minillm.replication.gather import Gatherer, ShardedStorage, gathered
from minillm.replication.method import Method, Setting
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Optimizer, Replication
from minillm.replication.zones import ZoneReducer, ZoneSlot, zones_of

KINDS = {"state": "optimizer state", "grads": "gradients", "values": "parameters"}
"""Kinds of flat arrays in the order in which the stages of ZeRO shard them."""


class ShardGroup:
    """Ranks that share a replica, and the ranks with this one's share of the other replicas.

    Collective over the token axes of the mesh.
    """

    def __init__(self, mesh: Mesh, size: int) -> None:
        replicas = mesh.axis(*TOKEN_AXES)
        self.size = size or replicas.size
        self.number, place = divmod(replicas.rank, self.size)
        name = replicas.name
        self.shards = _split(replicas, self.number, name)
        self.gathers = self.shards.dup(f"{name} gather") if self.size > 1 else self.shards
        self.peers = _split(replicas, replicas.size // self.size + place, f"{name} replicas")
        self.on_nodes = neighbours(replicas) == self.size < replicas.size

    def describe(self) -> str:
        """Return over which ranks a replica is sharded, in words for the plan."""
        number, groups = self.shards.size, self.peers.size
        ranks = f"{number} rank{'s' * (number > 1)}"
        if self.on_nodes:
            return f"the {ranks} of each of {groups} nodes"
        return f"{ranks}, in {groups} groups" if groups > 1 else ranks


def _split(comm: Communicator, color: int, name: str) -> Communicator:
    made = comm.split(color, comm.rank, name) if comm.size > 1 else comm
    assert made is not None
    return made


class ShardedMemory(PrivateMemory):
    """Memory of a ZeRO stage: whole arrays of the kinds that it does not shard."""

    axes: tuple[str, ...] = TOKEN_AXES

    def __init__(
        self, stage: int, group: ShardGroup, bucket_bytes: int, device: Device = CPU
    ) -> None:
        held = ", ".join(list(KINDS.values())[:stage])
        super().__init__(f"ZeRO {stage}: {held} sharded over {group.describe()}", device)
        self.stage, self.group, self.bucket_bytes = stage, group, bucket_bytes
        self.rank, self.size = group.shards.rank, group.shards.size
        self.shards = frozenset(list(KINDS)[:stage])
        self.reducers: dict[int, ZoneReducer] = {}  # id(buffers) -> reducer
        self.gatherers: dict[int, Gatherer] = {}

    def zones(self, layout: FlatLayout[Parameter]) -> Sequence[slice]:
        """Cut runs into zones of about `bucket_bytes`; where values are cut, of one block each."""
        return zones_of(layout, self.stage, self.bucket_bytes)

    def storage(self, buffers: FlatBuffers, span: Span[Parameter]) -> ParamStorage:
        """Return whole views, or storage that is reduced and gathered zone by zone."""
        trains = span.parameter.trains
        if self.stage == 1 or (self.stage == 2 and not trains):
            return super().storage(buffers, span)
        slot = self._slot(buffers, span) if trains else None
        if self.stage == 2:
            value = buffers.values[span.start : span.stop]
            return PlainStorage(value.reshape(buffers.shape_of(span.parameter)), slot)
        gatherer = self.gatherers.get(id(buffers))
        if gatherer is None:
            gatherer = self.gatherers[id(buffers)] = Gatherer(buffers, self.group.gathers)
        return ShardedStorage(gatherer, span, slot)

    def _slot(self, buffers: FlatBuffers, span: Span[Parameter]) -> ZoneSlot:
        """Return the gradient slot of a parameter in its zone."""
        reducer = self.reducers.get(id(buffers))
        if reducer is None:
            reducer = self.reducers[id(buffers)] = ZoneReducer(buffers, self.group.shards)
        return ZoneSlot(reducer.zone_at(span.start), span, buffers.shape_of(span.parameter))


class Zero(Replication):
    """Replicas that hold a share each of optimizer state, gradients and parameters."""

    memory: ShardedMemory

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Make the reducer of each stage."""
        super().attach(buffers)
        memory = self.memory
        self._reducers = {
            stage: memory.reducers.get(id(b)) or ZoneReducer(b, memory.group.shards)
            for stage, b in buffers.items()
        }
        self._gatherers = {
            stage: [memory.gatherers[id(held)] for held in b.all if id(held) in memory.gatherers]
            for stage, b in buffers.items()
        }
        for reducer in self._reducers.values():
            reducer.attach()
        self._counted = [part for stage in buffers for part in self._counted_of(stage)]

    def _counted_of(self, stage: int) -> Iterator[Array]:
        """Yield the parts of this rank's reduced gradients that enter the norm here."""
        buffers = self.buffers[stage]
        found = counted_parts(buffers.layout, self.layout, stage, self.mesh.coords, axes=("tp",))
        for counted, counts in found:
            for held in buffers.parts:
                part = overlap(counted, held)
                if counts and part.start < part.stop:
                    yield buffers.at(buffers.grads, "grads", part)

    @property
    def copies(self) -> Communicator:
        """The ranks that hold the same parameters."""
        return self.memory.group.peers if self.memory.stage == 3 else super().copies

    @property
    def replica(self) -> int:
        """Number of the replica of which this rank holds all parameters, or its share."""
        return self.memory.group.number if self.memory.stage == 3 else super().replica

    def observer(self, stage: int, last: bool) -> BackwardObserver | None:
        """Return the stage's reducer in the last pass, with sharded gradients in every pass."""
        return self._reducers[stage] if last or self.memory.stage > 1 else None

    def begin_step(self) -> None:
        """Discard last step's gradients."""
        super().begin_step()
        for reducer in self._reducers.values():
            reducer.start_step()

    def unshard(self, stage: int, way: str, then: str | None) -> None:
        """Launch the gather of the block that the pass uses first."""
        for gatherer in self._gatherers[stage]:
            gatherer.begin(way, then)

    def reshard(self, stage: int) -> None:
        """Drop what is gathered."""
        for gatherer in self._gatherers[stage]:
            gatherer.drop()

    def reduce(self, stage: int) -> None:
        """Wait for this rank's share of the sums of the stage, over all replicas."""
        started = time.perf_counter()
        buffers, works = self.buffers[stage], []
        self._reducers[stage].finish()
        for run, part in buffers.shared_runs():
            grads = buffers.at(buffers.grads, "grads", part)
            for axis in run.sum_axes:
                if axis not in TOKEN_AXES:
                    self.mesh.axis(axis).all_reduce_(grads)
            works.append(self.memory.group.peers.iall_reduce_(grads))
        for work in works:
            work.wait()
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> Any:
        """Return the squared norm of this rank's share; of all replicas the first one counts."""
        if self.memory.group.peers.rank:
            return 0.0
        return sum(map(kernels.sum_of_squares, self._counted))

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        """Update this rank's share, and gather the others' unless they are gathered on use."""
        held = [unit for gatherer in self.memory.gatherers.values() for unit in gatherer.held]
        assert not held, "parameters are gathered during an update"
        super().update(optimizer, step, lr, scale)
        if self.memory.stage == 3:
            return
        works = [
            self.memory.group.gathers.iall_gather_(reducer.buffers.values[zone.whole], zone.sizes)
            for reducer in self._reducers.values()
            for zone in reducer.zones
        ]
        for work in works:
            work.wait()


def _make(setting: Setting) -> Zero:
    """Return the method of a ZeRO stage. Collective over the mesh."""
    options = setting.options
    group = ShardGroup(setting.mesh, options.shard_group)
    memory = ShardedMemory(options.zero, group, setting.bucket_bytes, setting.device)
    return Zero(setting.mesh, setting.layout, memory)


def _sends(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Scatter gradients, gather weights; between shard groups, all-reduce a share.

    From stage 2 on, each microbatch scatters, except tied weights, which come once. Zones include
    the gaps that align parameters.
    """
    options, found = axis.options, Bytes()
    ways = options.shard_group or axis.mesh.dp
    zones = zones_of(layout, options.zero, int(options.bucket_mb * 1e6))
    tied = sum(z.stop - z.start for z in zones for r in layout.runs if r.tied and common(r, z))
    times = axis.passes.count("B") if options.zero > 1 else 1
    if ways > 1:
        scattered = times * (layout.size - tied) + tied
        moved = gathered(layout, axis.passes, axis.mesh.pp) if options.zero == 3 else layout.size
        found["dp", "reduce_scatter"] = scattered * axis.wide
        found["dp gather", "all_gather"] = moved * axis.item
    if axis.mesh.dp > ways:
        place, size = axis.rank % ways, 0
        for zone, cuts in zip(zones, layout.cuts(zones, ways), strict=True):
            held = slice(zone.start + cuts[place], zone.start + cuts[place + 1])
            size += sum(common(run, held) for run in layout.runs)
        found["dp replicas", "all_reduce"] = size * axis.wide
    return found


def _holds(sizes: Sizes, options: ReplicationOptions) -> Held:
    """Return the bytes of a share of each kind that the stage shards.

    Two gathered blocks come on top of the parameters, one block's gradient on top of the gradients.
    Where matrices stay whole, a share is larger by one at most.
    """
    ways, stage, block = options.shard_group or sizes.workers, options.zero, sizes.largest
    part = min(sizes.values, sizes.values // ways + sizes.whole)
    values = part + 2 * block if stage > 2 else sizes.values
    grads = part + block if stage > 1 else sizes.values
    state = sizes.state * part // max(1, sizes.values) * sizes.wide
    return Held(values * sizes.item, grads * sizes.wide, state)


def _alone(held: Held, options: ReplicationOptions, dp: int) -> int:
    """Return the bytes of a rank's shares, unless other groups hold the same."""
    ways = options.shard_group or dp
    if ways < dp:
        return 0
    return held.state + (held.values if options.zero > 2 or dp == 1 else 0)


def _check(options: ReplicationOptions, mesh: MeshShape, steps: int) -> None:
    """Raise ConfigError for groups that do not divide the ranks."""
    if options.shard_group and mesh.dp % options.shard_group:
        fitting = ", ".join(str(n) for n in range(1, mesh.dp + 1) if mesh.dp % n == 0)
        raise ConfigError(
            f"--shard-group {options.shard_group} does not divide the {mesh.dp} data-parallel "
            f"ranks; choose one of {fitting}"
        )


def _placed(options: ReplicationOptions, mesh: MeshShape, per_node: int) -> ReplicationOptions:
    """Shard within a node, replicate between nodes, unless a group is asked for.

    Ranks along tp are neighbours on the mesh, then those along dp.
    """
    ways, rest = divmod(per_node, mesh.tp)
    fits = not rest and 1 < ways < mesh.dp and mesh.dp % ways == 0
    return options.replace(shard_group=ways) if fits and not options.shard_group else options


METHOD = Method(
    name="zero",
    option="zero",
    lost=lambda options: "a lost rank takes the only copy of its share along, without --buddy",
    copies_suffice=True,
    alone=_alone,
    make=_make,
    sends=_sends,
    holds=_holds,
    cuts=lambda options, workers: options.shard_group or workers if options.zero == 3 else 1,
    key=lambda options: {"zero": options.zero, "shard_group": options.shard_group},
    check=_check,
    uneven=lambda options: options.zero == 1,  # the others reduce or gather in every microbatch
    placed=_placed,
    needs={"shard_group": "--zero"},
    compared={f"zero{stage}": {"zero": stage} for stage in (1, 2, 3)},
)
