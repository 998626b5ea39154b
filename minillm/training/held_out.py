"""Measurement of a model on held-out data, on any mesh.

Runs the forward-only schedule, the one place where a ragged last microbatch is legal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import on_host, to_host
from minillm.comm.communicator import MAX, Communicator
from minillm.models.protocol import Batch
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.tasks.protocol import Measure, Result
from minillm.training.assembly import Assembly


class Stopped(Exception):
    """End of a measurement on every rank, since one was asked to stop."""


LOOK = 8  # microbatches per stage between two looks for a request to stop


def measure(
    model: Assembly,
    what: Measure,
    world: Communicator,
    microbatch: int,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Return the metrics of a model, the same on every rank. Collective over `world`.

    Each data-parallel rank takes every n-th row, `microbatch` rows at a time. Sums are added over
    the ranks, averages are never averaged. Raises Stopped on every rank once `stop` is true on one.
    """
    mesh, device = model.mesh, model.device
    data = mesh.axis("dp", "ep")
    rows = np.arange(data.rank, what.num_rows, data.size)
    values: dict[str, list[Any]] = defaultdict(list)

    def count(outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        found = what.count(outputs, batch)
        for name, value in found.items():
            values[name].append(value)
        return found

    stride = microbatch * LOOK * mesh.axis("pp").size
    for first in range(0, -(-what.num_rows // data.size), stride):
        part = rows[first : first + stride]
        batches = [
            what.batch(part[i : i + microbatch], device) for i in range(0, len(part), microbatch)
        ]
        if batches:
            schedule = lower(forward_only(model.layout.rank_of_stage, len(batches)), train=False)
            PipelineRuntime(
                schedule, model.stages, mesh.axis("pp"), model.replication, count=count
            ).run(batches)
        if stop is not None and world.reduce_numbers([stop()], MAX)[0]:
            raise Stopped
    # The ranks along tp hold equal sums: the first one counts.
    counts = mesh.coord("tp") == 0
    own = [_total(values[name]) if counts else 0.0 for name in what.sums]
    return what.result(dict(zip(what.sums, world.reduce_numbers(own), strict=True)))


def _total(values: list[Any]) -> float:
    """Return the sum, of floats on the host and of arrays on a device."""
    host = all(on_host(value) for value in values)
    return float(to_host(sum(map(float, values) if host else values, 0.0)))
