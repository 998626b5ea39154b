"""Measurement of a model on held-out data, on any mesh.

Runs the forward-only schedule, the one place where a ragged last microbatch is legal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import to_host
from minillm.comm.communicator import MAX, Communicator
from minillm.models.protocol import Batch
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.tasks.protocol import ByRow, Measure, OfLengths, Result
from minillm.training.assembly import Assembly


class Stopped(Exception):
    """End of a measurement on every rank, since one was asked to stop."""


LOOK = 8  # microbatches per stage between two looks for a request to stop


def measure(
    model: Assembly,
    what: Measure | ByRow,
    world: Communicator,
    microbatch: int,
    stop: Callable[[], bool] | None = None,
    advance: Callable[[int], Any] = lambda number: None,
) -> Result:
    """Return the metrics of a model, the same on every rank. Collective over `world`.

    Each data-parallel rank takes every n-th row, `microbatch` rows at a time, short ones first.
    Sums are added over the ranks, averages are never averaged. Raises Stopped on every rank once
    `stop` is true on one. `advance` is called with the number of rows done, of all ranks. Some
    microbatches exist at a time, so memory grows with the rows only by the numbers that a `ByRow`
    keeps of each.
    """
    mesh, device = model.mesh, model.device
    data = mesh.axis("dp", "ep")
    lengths = what.lengths if isinstance(what, OfLengths) else np.zeros(what.num_rows)
    rows = np.argsort(lengths, kind="stable")[data.rank :: data.size]
    values: dict[str, list[Any]] = defaultdict(list)
    first_of_tp = mesh.coord("tp") == 0  # the ranks along tp find equal numbers
    table = np.zeros((what.num_rows, what.width)) if isinstance(what, ByRow) else None

    def count(outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        if isinstance(what, ByRow) and table is not None and first_of_tp:
            table[batch.where.samples] = what.each(outputs, batch)
        return what.count(outputs, batch)

    # Every rank runs as many microbatches, the last perhaps without rows: sharded parameters are
    # gathered by all replicas together.
    most, stride = -(-what.num_rows // data.size), microbatch * LOOK * mesh.axis("pp").size
    for first in range(0, most, stride):
        starts = range(first, min(first + stride, most), microbatch)
        batches = [what.batch(rows[i : i + microbatch], device) for i in starts]
        passes = forward_only(model.layout.rank_of_stage, len(batches))
        schedule = lower(passes, train=False, sharded=model.replication.sharded)
        runtime = PipelineRuntime(
            schedule, model.stages, mesh.axis("pp"), model.replication, count=count
        )
        runtime.run(batches)
        for name, terms in runtime.terms.items():
            values[name] += terms
        advance(min(stride * data.size, what.num_rows - first * data.size))
        if stop is not None and world.reduce_numbers([stop()], MAX)[0]:
            raise Stopped
    own = [float(to_host(sum(values[name], 0.0))) if first_of_tp else 0.0 for name in what.sums]
    sums = dict(zip(what.sums, world.reduce_numbers(own), strict=True))
    if isinstance(what, ByRow):
        return what.result_of(sums, world.all_reduce_(table, kind="control"))
    return what.result(sums)
