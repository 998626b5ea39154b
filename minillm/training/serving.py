"""Runs with dedicated servers: the ranks behind those of the mesh serve while the others train."""

from __future__ import annotations

from collections.abc import Callable

from minillm.base.arrays import float_dtype
from minillm.comm.agreement import AgreedError
from minillm.comm.communicator import Communicator
from minillm.models.protocol import INIT_STD
from minillm.parallel.tensor import PlannedGroup
from minillm.pipeline.schedules import SCHEDULES
from minillm.replication.parameter_server import shard_class
from minillm.replication.protocol import MakeOptimizer
from minillm.replication.server import Server
from minillm.replication.server_shards import Shard, key_range
from minillm.replication.server_worker import AXIS, leave
from minillm.training.assembly import build_model, layout_of
from minillm.training.optimizers import maker
from minillm.training.resolve import ResolvedConfig

Work = Callable[[Communicator, Communicator | None], object]
"""Work of the workers, from their group and the wire to the servers."""
MakeServer = Callable[[Communicator, ResolvedConfig], Server]
"""Make the server of this rank of the wire."""


def with_servers(
    comm: Communicator,
    config: ResolvedConfig,
    work: Work,
    make: MakeServer | None = None,
) -> None:
    """Run `work` on the ranks of the mesh, while the others serve. Collective over `comm`.

    Without dedicated servers every rank works, and the wire is None. `make` replaces
    `make_server`. An AgreedError of the workers is raised on every rank.
    """
    if not config.options.replication.num_servers:
        work(comm, None)
        return
    wire, failure = comm.dup(AXIS), None
    serves = comm.rank >= config.mesh.num_ranks
    group = comm.split(int(serves))
    assert group is not None
    if serves:
        (make or make_server)(wire, config).serve(config.mesh.num_ranks)
    else:
        try:
            work(group, wire)
        except AgreedError as error:
            failure = str(error)
        leave(wire, config.mesh)
    failure = comm.broadcast_json(failure)
    if failure is not None:
        raise AgreedError(failure)


def make_server(
    wire: Communicator,
    config: ResolvedConfig,
    *,
    std: float = INIT_STD,
    optimizer: MakeOptimizer | None = None,
) -> Server:
    """Return the server of this rank of `wire`, with initial values. Not collective.

    It holds one shard for each coordinate on pp and tp.
    """
    mesh, options = config.mesh, config.options
    number, count = wire.rank - mesh.num_ranks, wire.size - mesh.num_ranks
    schedule = SCHEDULES[options.pipeline.schedule](mesh.pp, config.num_microbatches)
    layout = layout_of(config, schedule.rank_of_stage)
    dtype, make = float_dtype(options.compute.dtype), optimizer or maker(options.optimization)
    shards: list[Shard] = []
    for index in range(mesh.pp * mesh.tp):
        coords = {"pp": index // mesh.tp, "dp": number, "cp": 0, "ep": 0, "tp": index % mesh.tp}
        buffers = {}
        for stage in layout.stages_of(coords["pp"]):
            group = PlannedGroup(coords["tp"], mesh.tp)
            model = build_model(config, layout, stage, group, std=std)
            buffers[stage] = key_range(model.parameters(), mesh, dtype, number, count)
            buffers[stage].initialise(options.optimization.seed, mesh, coords)
        made = shard_class(options.replication)
        shards.append(made(buffers, make(list(buffers.values())), mesh.dp, layout, coords))

    def place(rank: int) -> tuple[int, int]:
        found = mesh.coords(rank)
        return found["dp"], found["pp"] * mesh.tp + found["tp"]

    return Server(wire, shards, place)
