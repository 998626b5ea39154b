"""Data axis of a trainer, for the closed formulas of replication/costs.py, and the bytes held."""

from __future__ import annotations

from minillm.comm.two_levels import TwoLevels
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.pipeline.action import ActionKind
from minillm.pipeline.schedules import SCHEDULES
from minillm.replication.costs import DataAxis
from minillm.replication.server import Server
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import Trainer


def data_axis(trainer: Trainer) -> DataAxis:
    """Return the part of this rank in the data-parallel method of `trainer`."""
    config, buffers, mesh = trainer.config, trainer.model.buffers, trainer.mesh
    schedule = SCHEDULES[config.options.pipeline.schedule](config.mesh.pp, config.num_microbatches)
    row = schedule.actions[mesh.coord("pp")]
    shared_by = trainer.replication.memory.alias[1]
    return DataAxis(
        layouts=[b.layout for b in buffers],
        mesh=config.mesh,
        options=config.replication,
        item=buffers[0].values.itemsize,
        wide=buffers[0].grads.itemsize,
        rank=mesh.axis(*TOKEN_AXES).rank,
        shared_by=shared_by,
        nodes={
            name: (sums.ways, sums.place)
            for name, sums in trainer.replication.sums.items()
            if isinstance(sums, TwoLevels)
        },
        passes="".join(a.kind for a in row if a.kind in (ActionKind.F, ActionKind.B)),
    )


def server_axis(config: ResolvedConfig, server: Server, number: int) -> DataAxis:
    """Return the part of dedicated server `number` in the method."""
    buffers = [b for shard in server.shards for b in shard.buffers]
    return DataAxis(
        layouts=[b.layout for b in buffers],
        mesh=config.mesh,
        options=config.options.replication,
        item=buffers[0].values.itemsize,
        wide=buffers[0].grads.itemsize,
        rank=0,
        server=number,
    )


def held_bytes(trainer: Trainer) -> int:
    """Return the bytes of the arrays that this rank keeps between steps.

    They are weights, gradients, optimizer state and what the method remembers. Of arrays in shared
    memory this rank's equal part counts.
    """
    common, own = 0, 0
    for buffers in trainer.model.buffers:
        common += sum(held.values.nbytes for held in buffers.all)
        common += 0 if buffers.masters is None else buffers.masters.nbytes
        own += buffers.grads.nbytes
    common += trainer.replication.state_bytes(trainer.optimizer)
    bases: dict[int, int] = {}
    for tensor in trainer.replication.state():
        base = tensor.data
        while hasattr(base.base, "nbytes"):
            base = base.base
        bases[id(base)] = base.nbytes
    return common // trainer.replication.memory.alias[1] + own + sum(bases.values())
