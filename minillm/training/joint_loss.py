"""Losses that compare the examples of a whole step: the replicas, and a first of two passes.

A replica with one microbatch computes its loss within the pass. With several, no pass sees all
examples, so the outputs are computed twice (Gao et al. 2021, arXiv:2101.06983):

    1. forward passes of all microbatches without a tape, dropout as in 2
    2. the loss of all outputs, and its gradient for those of each microbatch
    3. the usual step, in which each microbatch begins its backward pass from its gradient

Memory stays that of one microbatch. Dropout masks follow from addresses, so both passes agree.
The ledger counts what such a loss sends under an axis of its own, `AXIS`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.models.protocol import Batch, Joint
from minillm.pipeline.action import Schedule
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.training.assembly import Assembly

AXIS = "joint loss"


class JointLoss:
    """Part of a step before its passes, for models that are `Joint`; for others a no-op."""

    def __init__(self, model: Assembly) -> None:
        """Compare the examples of the replicas that update together. Collective over them."""
        self.model, method = model, model.replication
        self._lowered = functools.cache(self._first_passes)
        self.joint = any(isinstance(stage.model, Joint) for stage in model.stages.values())
        alone = not method.lockstep or method.workers[1] > 1
        self.replicas: Communicator = SelfCommunicator()
        if self.joint and not alone:
            self.replicas = model.mesh.axis("dp", "ep").dup(AXIS)

    def into(self, batches: Sequence[Batch], deal: Sequence[int]) -> list[Batch]:
        """Return this rank's batches of a step with what their losses need.

        `deal` are the microbatches of each replica. Collective over the replicas and their stages.
        """
        if not self.joint:
            return list(batches)
        found = [batch._replace(replicas=self.replicas) for batch in batches]
        return found if set(deal) == {1} else self._twice(found)

    def _first_passes(self, number: int) -> Schedule:
        """Return the schedule of the first passes of so many microbatches."""
        schedule = forward_only(self.model.layout.rank_of_stage, number)
        return lower(schedule, train=False, sharded=self.model.replication.sharded)

    def _twice(self, batches: list[Batch]) -> list[Batch]:
        outputs = list[Array]()

        def keep(found: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
            outputs.append(found[-1].data)
            return {}

        if batches:
            runtime = PipelineRuntime(
                self._lowered(len(batches)),
                self.model.stages,
                self.model.mesh.axis("pp"),
                self.model.replication,
                count=keep,
                dropout=True,
            )
            runtime.run([batch._replace(divisors={}) for batch in batches])
        last = self.model.stages.get(self.model.layout.num_stages - 1)
        if last is None or not isinstance(last.model, Joint):
            return batches
        return last.model.join(outputs, batches, self.replicas)
