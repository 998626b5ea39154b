"""Measurement of a model on held-out data, on any mesh.

Runs the forward-only schedule, the one place where a ragged last microbatch is legal.
"""

from __future__ import annotations

import numpy as np

from minillm.base.arrays import to_host
from minillm.comm.communicator import Communicator
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.tasks.protocol import Measure, Result
from minillm.training.assembly import Assembly


def measure(model: Assembly, what: Measure, world: Communicator, microbatch: int) -> Result:
    """Return the metrics of a model, the same on every rank. Collective over `world`.

    Each data-parallel rank takes every n-th row, `microbatch` rows at a time. Sums are added over
    the ranks, averages are never averaged.
    """
    mesh, device = model.mesh, model.device
    data = mesh.axis("dp", "ep")
    rows = np.arange(data.rank, what.num_rows, data.size)
    batches = [
        what.batch(rows[i : i + microbatch], device) for i in range(0, len(rows), microbatch)
    ]
    sums = {}
    if batches:
        schedule = lower(forward_only(model.layout.rank_of_stage, len(batches)), train=False)
        runtime = PipelineRuntime(
            schedule, model.stages, mesh.axis("pp"), model.replication, count=what.count
        )
        sums = runtime.run(batches)
    # The ranks along tp hold equal sums: the first one counts.
    counts = mesh.coord("tp") == 0
    own = [float(to_host(sums.get(name, 0.0))) if counts else 0.0 for name in what.sums]
    return what.result(dict(zip(what.sums, world.reduce_numbers(own), strict=True)))
