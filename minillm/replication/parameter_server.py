"""Parameter server as a data-parallel method: its options, formulas and parts.

Workers (server_worker.py) push gradients to servers (server.py) and pull weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from minillm.base.errors import ConfigError
from minillm.layout.flat import FlatLayout
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import share
from minillm.replication.costs import Bytes, DataAxis, Held, Sizes
from minillm.replication.method import Extent, Method, Setting
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Replication
from minillm.replication.server_shards import FreeShard, Shard, SyncShard
from minillm.replication.server_worker import AXIS, FreeWorker, SyncWorker, WorkerMemory
from minillm.replication.zero import METHOD as ZERO


def shard_class(options: ReplicationOptions) -> Callable[..., Shard]:
    """Return what makes a server's part: `SyncShard`, or `FreeShard` with its staleness."""
    if options.server == "sync":
        return SyncShard
    staleness = options.staleness if options.server == "stale" else math.inf
    return partial(FreeShard, staleness=staleness)


def _as_zero(options: ReplicationOptions) -> ReplicationOptions | None:
    """Return the options of ZeRO 1 if that is what they ask for by another name, else None.

    If every worker serves a share of what one sum of gradients updates, each rank receives and
    sends what ZeRO 1 scatters and gathers.
    """
    if options.server == "sync" and not options.servers:
        return dataclasses.replace(options, server="none", zero=1)
    return None


def _make(setting: Setting) -> Replication:
    mesh, options, wire = setting.mesh, setting.options, setting.wire
    if (zero := _as_zero(options)) is not None:
        return ZERO.make(setting._replace(options=zero))
    workers = mesh.size("dp")
    first, count = (mesh.shape.num_ranks, options.servers) if options.servers else (0, workers)
    if wire is None:
        wire = mesh.axis("dp").dup(AXIS)
    hold = {0: "each worker holds its share of", 1: "1 rank holds"}
    who = hold.get(options.servers, f"{options.servers} ranks hold")
    how = {
        "sync": "one update a step from the sum over the workers",
        "async": "an update at every push, so the result depends on dp and on time",
        "stale": f"an update at every push, workers at most {options.staleness} steps apart, so "
        "the result depends on dp and on time",
    }[options.server]
    words = f"parameter server ({options.server}): {who} weights and optimizer state; {how}"
    memory = WorkerMemory(words, mesh.coord("dp"), workers)
    cls = SyncWorker if options.server == "sync" else FreeWorker
    serves = None if options.servers else shard_class(options)
    return cls(mesh, setting.layout, memory, wire, first, count, serves)


def _asked(axis: DataAxis, layout: FlatLayout[Any]) -> tuple[int, int]:
    """Return the elements that a rank pushes and pulls, and those that it serves to all others.

    Of its own range a worker that serves sends nothing.
    """
    options, workers = axis.options, axis.mesh.dp
    number = axis.rank if axis.server is None else axis.server
    part = share(layout.size, number, options.servers or workers, layout.step)
    held = part.stop - part.start
    if axis.server is not None:
        return 0, workers * held
    return (layout.size, 0) if options.servers else (layout.size - held, (workers - 1) * held)


def _sends(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Push each gradient, pull each weight."""
    if (zero := _as_zero(axis.options)) is not None:
        return ZERO.sends(dataclasses.replace(axis, options=zero), layout)
    asked, served = _asked(axis, layout)
    found = _pull(axis, layout)
    found[AXIS, "send"] += asked * axis.wide
    found[AXIS, "receive"] += served * axis.wide
    return found


def _pull(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    asked, served = _asked(axis, layout)
    return Bytes({(AXIS, "send"): served * axis.item, (AXIS, "receive"): asked * axis.item})


def _meets(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Pull each weight, where workers do not have the same ones anyway."""
    return Bytes() if axis.options.server == "sync" else _pull(axis, layout)


def _holds(sizes: Sizes, options: ReplicationOptions) -> Held:
    """Return the bytes of a worker: weights and gradients, and the range that it serves."""
    if (zero := _as_zero(options)) is not None:
        return ZERO.holds(sizes, zero)
    held = Held(sizes.values * sizes.item, sizes.values * sizes.wide, 0)
    if options.servers:
        return held
    served = range_held(sizes.values, sizes.workers, sizes.item, options, sizes.workers)
    return held._replace(state=served.values + served.grads + served.state)


def range_held(size: int, count: int, item: int, options: ReplicationOptions, workers: int) -> Held:
    """Return the bytes of one of `count` servers of `size` elements under AdamW.

    Under `sync` a gradient that arrives lies beside the sum.
    """
    part = size // count * item
    grads = 2 if options.server == "sync" and workers > 1 else 1
    return Held(part, grads * part, 2 * part)


def _check(options: ReplicationOptions, mesh: MeshShape, steps: int) -> None:
    """Raise ConfigError for workers of several ranks whose weights would differ in version."""
    if options.server != "sync" and mesh.tp * mesh.pp > 1 and options.servers != 1:
        raise ConfigError(
            f"--server {options.server} with --tp {mesh.tp} --pp {mesh.pp} needs --servers 1, not "
            f"{options.servers}: the ranks of a worker would hold weights of different versions. "
            "Use --servers 1, or --tp 1 --pp 1, or --server sync"
        )


def _key(options: ReplicationOptions) -> dict[str, Any]:
    if (zero := _as_zero(options)) is not None:
        return ZERO.key(zero)
    if options.server == "sync":
        return {"server": "sync", "servers": options.servers}  # in whose order norms are summed
    staleness = {"staleness": options.staleness} if options.server == "stale" else {}
    return {"server": options.server, **staleness}


def _dedicated(extent: Extent) -> int:
    """Return the fewest servers that leave replicas which divide the batch; 0 for none."""
    for servers in range(1, extent.ranks):
        workers, rest = divmod(extent.ranks - servers, extent.replica)
        if workers and not rest and extent.batch % workers == 0:
            return servers
    return 0


METHOD = Method(
    name="server",
    option="server",
    lost=lambda options: "a lost server takes the only copy of its weights along",
    unskippable=lambda options: (
        "" if options.server == "sync" else "a server updates before all losses are known"
    ),
    make=_make,
    sends=_sends,
    meets=_meets,
    holds=_holds,
    key=_key,
    workers=lambda options, dp: 1 if options.server == "sync" else dp,
    equals_one_rank=lambda options, mesh: options.server == "sync",
    check=_check,
    needs_host=lambda options: _as_zero(options) is None,
    needs={"servers": "--server", "staleness": "--server stale"},
    goes_with="--tp, --sequence-parallel and --pp (async and stale then with --servers 1), and "
    "--node-shared auto or off",
    compared={
        f"server {mode}": {"server": mode, "servers": _dedicated}
        for mode in ("sync", "async", "stale")
    },
)
