"""Measurement of a model on held-out data, on any mesh.

Runs the forward-only schedule, the one place where a ragged last microbatch is legal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from minillm.base.arrays import to_host
from minillm.comm.communicator import MAX, Communicator
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
    advance: Callable[[int], Any] = lambda number: None,
) -> Result:
    """Return the metrics of a model, the same on every rank. Collective over `world`.

    Each data-parallel rank takes every n-th row, `microbatch` rows at a time. Sums are added over
    the ranks, averages are never averaged. Raises Stopped on every rank once `stop` is true on one.
    `advance` is called with the number of rows done, of all ranks. Memory does not grow with the
    rows: some microbatches exist at a time.
    """
    mesh, device = model.mesh, model.device
    data = mesh.axis("dp", "ep")
    rows = np.arange(data.rank, what.num_rows, data.size)
    values: dict[str, list[Any]] = defaultdict(list)

    # Every rank runs as many microbatches, the last perhaps without rows: sharded parameters are
    # gathered by all replicas together.
    most, stride = -(-what.num_rows // data.size), microbatch * LOOK * mesh.axis("pp").size
    for first in range(0, most, stride):
        starts = range(first, min(first + stride, most), microbatch)
        batches = [what.batch(rows[i : i + microbatch], device) for i in starts]
        passes = forward_only(model.layout.rank_of_stage, len(batches))
        schedule = lower(passes, train=False, sharded=model.replication.sharded)
        runtime = PipelineRuntime(
            schedule, model.stages, mesh.axis("pp"), model.replication, count=what.count
        )
        runtime.run(batches)
        for name, terms in runtime.terms.items():
            values[name] += terms
        advance(min(stride * data.size, what.num_rows - first * data.size))
        if stop is not None and world.reduce_numbers([stop()], MAX)[0]:
            raise Stopped
    # The ranks along tp hold equal sums: the first one counts.
    counts = mesh.coord("tp") == 0
    own = [float(to_host(sum(values[name], 0.0))) if counts else 0.0 for name in what.sums]
    return what.result(dict(zip(what.sums, world.reduce_numbers(own), strict=True)))
