"""Forward passes over many texts: batches dealt to the replicas, results gathered from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.comm.communicator import Communicator
from minillm.models.protocol import Batch
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.training.assembly import Assembly


def last_outputs(
    model: Assembly,
    batches: Sequence[Batch],
    read: Callable[[tuple[Tensor, ...], Batch], np.ndarray],
) -> list[np.ndarray]:
    """Return what `read` makes of the last stage's outputs for each batch; [] on earlier stages.

    Collective over the tp and pp axes of one replica.
    """
    found: list[np.ndarray] = []
    if not batches:
        return found

    def keep(outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        found.append(read(outputs, batch))
        return {}

    schedule = lower(
        forward_only(model.layout.rank_of_stage, len(batches)),
        train=False,
        sharded=model.replication.sharded,
    )
    runtime = PipelineRuntime(
        schedule, model.stages, model.mesh.axis("pp"), model.replication, count=keep
    )
    runtime.run(batches)
    return found


def own_batches(lengths: Sequence[int], batch: int, model: Assembly) -> list[list[int]]:
    """Return the numbers of the texts in each batch of this replica, the longest texts first."""
    replicas = model.mesh.axis("dp")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return batches[replicas.rank :: replicas.size]


def gather_rows_(
    rows: np.ndarray,
    batches: Sequence[Sequence[int]],
    found: Sequence[np.ndarray],
    model: Assembly,
    comm: Communicator,
) -> None:
    """Fill zeros `rows` [N, D] on every rank from what each replica found for its batches.

    `found` is empty before the last stage. Collective over `comm`, all ranks.
    """
    for places, values in zip(batches, found, strict=False):
        rows[places] = values if model.mesh.coord("tp") == 0 else 0
    comm.all_reduce_(rows, kind="control")
