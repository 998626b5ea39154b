"""Executor of schedules: one loop for training on one rank, pipelines and evaluation.

A schedule is data (schedules.py, lower.py). The runtime looks up each action's kind in one dict and
calls the method found there. It knows neither GPipe nor 1F1B, neither the model nor the method of
data parallelism. Receives go into fresh buffers, because the tape may still refer to earlier ones.
Sends are non-blocking and retired as the step continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from minillm.autograd.backward import WeightGradWork, backward
from minillm.autograd.tape import Tensor, no_grad
from minillm.base.arrays import Array, namespace, on_host
from minillm.base.trace import Tracer
from minillm.comm.communicator import Communicator, Work
from minillm.comm.ledger import ledger
from minillm.models.protocol import ArraySpec, Batch
from minillm.pipeline.action import COMPUTE, UNSHARD, Action, ActionKind, Schedule
from minillm.pipeline.stage import Live, Stage
from minillm.replication.protocol import Replication

Sums = dict[str, Any]
"""Name -> sum over this rank's microbatches: a float, or on a GPU an array without dims."""

Counter = Callable[[tuple[Tensor, ...], Batch], Mapping[str, Any]]
"""Counts of a last stage's outputs, by name, that evaluation adds up over microbatches."""

Key = tuple[int, int]  # (stage, microbatch)

Mailbox = dict[Key, tuple[Array, ...]]
"""(destination stage, microbatch) -> arrays for it.

Computation puts and takes. A send takes what is for another rank, a receive puts what arrived.
"""

_ONE = np.ones(())  # the gradient of each loss


class PipelineRuntime:
    """Executor of one rank's row of a lowered schedule over its stages.

    `links` sends between the ranks of the pp axis. `optimizer_step` is called for OPTIMIZER_STEP
    with this rank's sums of losses. Without it nothing is put on the tape, and `count` is called
    with the outputs of the last stage. `dropout`: None, as in training or not. `slowdown` is the
    factor by which computation takes longer.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        links: Communicator,
        replication: Replication,
        *,
        tracer: Tracer | None = None,
        optimizer_step: Callable[[Sums], None] | None = None,
        count: Counter | None = None,
        dropout: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
        slowdown: float = 1.0,
    ) -> None:
        self.stages = dict(stages)
        self.links = links
        self.replication = replication
        self.tracer = tracer
        self.train = optimizer_step is not None
        self.dropout = self.train if dropout is None else dropout
        self.count = count
        self.slowdown = slowdown
        self._optimizer_step = optimizer_step or (lambda sums: None)
        self._clock = clock
        self.compute_seconds = 0.0
        """Seconds of this rank in the passes of the last run, without its waits for other ranks."""
        self.use(schedule)

    def use(self, schedule: Schedule) -> None:
        """Execute another schedule from the next run on, over the same stages."""
        self.schedule = schedule
        self.row = schedule.actions[self.links.rank]
        self._following = _following(self.row)
        self._arming = {_key(action) for action in schedule.arming}
        self._source = {link.dst_stage: link.src_stage for link in schedule.links}
        self._target = {link.src_stage: link.dst_stage for link in schedule.links}
        # One tag per link and direction: links between the same two ranks do not mix.
        self._tags = {(link.src_stage, link.dst_stage): 2 * link.tag for link in schedule.links}
        self._tags |= {
            (link.dst_stage, link.src_stage): 2 * link.tag + 1 for link in schedule.links
        }

    def run(self, batches: Sequence[Batch]) -> Sums:
        """Execute the row on this rank's microbatches.

        Returns this rank's sums by name: losses of the stages it holds, and counts in evaluation.
        On a GPU they are arrays that the host has not waited for.
        """
        self._batches = batches
        self._live: dict[Key, Live] = {}
        self._activations: Mailbox = {}
        self._grads: Mailbox = {}
        self._sends: list[Work] = []
        self.terms: dict[str, list[Any]] = {}  # of the sums, by name, in order
        self.compute_seconds = 0.0
        if self.train:
            self.replication.begin_step()
        with nullcontext() if self.train else no_grad():
            for action in self.row:
                self._execute(action)
                if self._sends:
                    self._sends = [work for work in self._sends if not work.test()]
        for work in self._sends:
            work.wait()
        self._batches = ()
        return self._totals()

    def _execute(self, action: Action) -> None:
        method = METHODS[action.kind]
        if self.slowdown > 1 and action.kind in COMPUTE:
            method = self._slowly
        started = self._clock() - _waited()
        with nullcontext() if self.tracer is None else self.tracer.span(str(action), "compute"):
            method(self, action)
        if action.kind in COMPUTE:
            self.compute_seconds += self._clock() - _waited() - started

    @staticmethod
    def _slowly(run: PipelineRuntime, action: Action) -> None:
        """Execute an action, then idle until it has taken `slowdown` times as long.

        The time that it waits for other ranks does not count.
        """
        started = time.perf_counter() - _waited()
        METHODS[action.kind](run, action)
        now = time.perf_counter()
        end = now + (run.slowdown - 1) * (now - _waited() - started)
        while (left := end - time.perf_counter()) > 0:
            run.replication.progress()
            time.sleep(min(left, 1e-3))

    def _totals(self) -> Sums:
        return {name: sum(values, 0.0) for name, values in self.terms.items()}

    def _add(self, sums: Mapping[str, Any]) -> None:
        for name, value in sums.items():
            value = float(value) if on_host(value) else value
            self.terms.setdefault(name, []).append(value)

    def _forward(self, action: Action) -> None:
        stage, key = self.stages[action.stage], _key(action)
        batch = self._batches[key[1]]
        specs = stage.model.receives(batch)
        arrived = tuple(
            Tensor(array, spec.differentiable and self.train)
            for array, spec in zip(self._activations.pop(key, ()), specs, strict=True)
        )
        outputs, losses = stage.model.forward(arrived, batch, self.dropout)
        self._add({name: loss.data for name, loss in losses.items()})
        handed_on = action.stage in self._target
        if handed_on:
            self._activations[self._target[action.stage], key[1]] = tuple(t.data for t in outputs)
        elif self.count is not None:
            self._add(self.count(outputs, batch))
        if self.train:
            # The next stage sends a gradient of every float, also to a stage where nothing trains.
            kept = tuple(t for t in outputs if t.dtype.kind not in "biu") if handed_on else ()
            self._live[key] = Live(arrived, kept, tuple(losses.values()))

    def _backward(self, action: Action) -> None:
        self._differentiate(action, self._live.pop(_key(action)), None)

    def _input_grad(self, action: Action) -> None:
        live = self._live[_key(action)]
        self._differentiate(action, live, live.deferred)

    def _weight_grad(self, action: Action) -> None:
        key = _key(action)
        observer = self.replication.observer(action.stage, key in self._arming)
        deferred = self._live.pop(key).deferred
        deferred.reverse()
        # Emptied, because each work refers to the list: a cycle that reference counts never free.
        while deferred:
            deferred.pop().run()
            if observer is not None:
                observer.between_nodes()

    def _differentiate(
        self, action: Action, live: Live, defer: list[WeightGradWork] | None
    ) -> None:
        """Run B or I: from the gradients of the stage's outputs and losses to those of its inputs.

        Every loss has gradient 1: `divisors` have scaled it already.
        """
        key = _key(action)
        roots = [(loss, _ONE) for loss in live.losses if loss.requires_grad]
        if live.outputs:
            roots += zip(live.outputs, self._grads.pop(key), strict=True)
        arrived, live.arrived, live.outputs, live.losses = live.arrived, (), (), ()
        observer = self.replication.observer(action.stage, key in self._arming)
        backward(roots, defer=defer, observer=observer)
        if action.stage in self._source:
            self._grads[self._source[action.stage], key[1]] = tuple(
                _grad(tensor) for tensor in arrived if tensor.requires_grad
            )

    def _unshard(self, action: Action) -> None:
        following = self._following[action]
        way, then = action.kind[-1], None if following is None else following[-1]
        self.replication.unshard(action.stage, way, then)

    def _send_activation(self, action: Action) -> None:
        self._send(self._activations, self._target[action.stage], action)

    def _receive_activation(self, action: Action) -> None:
        specs = self.stages[action.stage].model.receives(self._batches[_key(action)[1]])
        self._receive(self._activations, self._source[action.stage], action, specs)

    def _send_grad(self, action: Action) -> None:
        self._send(self._grads, self._source[action.stage], action)

    def _receive_grad(self, action: Action) -> None:
        outputs = self._live[_key(action)].outputs
        specs = [ArraySpec("", t.shape, t.dtype, True) for t in outputs]
        self._receive(self._grads, self._target[action.stage], action, specs)

    def _send(self, mailbox: Mailbox, to_stage: int, action: Action) -> None:
        rank, tag = self.schedule.rank_of_stage[to_stage], self._tags[action.stage, to_stage]
        for array in mailbox.pop((to_stage, _key(action)[1])):
            self._sends.append(self.links.isend(array, rank, tag))

    def _receive(
        self, mailbox: Mailbox, from_stage: int, action: Action, specs: Sequence[ArraySpec]
    ) -> None:
        """Receive arrays for `action.stage` into fresh buffers.

        The tape may still refer to the buffers of earlier microbatches.
        """
        rank, tag = self.schedule.rank_of_stage[from_stage], self._tags[from_stage, action.stage]
        xp = namespace(self.stages[action.stage].buffers.values)
        arrays = tuple(xp.empty(spec.shape, spec.dtype) for spec in specs)
        for array in arrays:
            self.links.recv(array, rank, tag)
        mailbox[_key(action)] = arrays


METHODS: dict[ActionKind, Callable[[PipelineRuntime, Action], None]] = {
    ActionKind.F: PipelineRuntime._forward,
    ActionKind.B: PipelineRuntime._backward,
    ActionKind.I: PipelineRuntime._input_grad,
    ActionKind.W: PipelineRuntime._weight_grad,
    ActionKind.SEND_F: PipelineRuntime._send_activation,
    ActionKind.RECV_F: PipelineRuntime._receive_activation,
    ActionKind.SEND_B: PipelineRuntime._send_grad,
    ActionKind.RECV_B: PipelineRuntime._receive_grad,
    ActionKind.UNSHARD_F: PipelineRuntime._unshard,
    ActionKind.UNSHARD_B: PipelineRuntime._unshard,
    ActionKind.RESHARD: lambda run, action: run.replication.reshard(action.stage),
    ActionKind.TIE_REDUCE: lambda run, action: run.replication.reduce_ties(),
    ActionKind.REDUCE_GRAD: lambda run, action: run.replication.reduce(action.stage),
    ActionKind.OPTIMIZER_STEP: lambda run, action: run._optimizer_step(run._totals()),
}
"""Kind -> what executes it: functions, because a runtime with its own bound methods is a cycle."""


def _waited() -> float:
    """Return the seconds that this rank has been blocked in communication."""
    return sum(row.seconds for row in ledger().rows.values())


def _following(row: Sequence[Action]) -> dict[Action, ActionKind | None]:
    """Return the kind of the UNSHARD that follows each one; None if a RESHARD comes first."""
    found: dict[Action, ActionKind | None] = {}
    after: ActionKind | None = None
    for action in reversed(row):
        if action.kind is ActionKind.RESHARD:
            after = None
        elif action.kind in UNSHARD.values():
            found[action] = after
            after = action.kind
    return found


def _grad(tensor: Tensor) -> Array:
    """Return the gradient of a stage's input, zero if no output depends on it."""
    return namespace(tensor.data).zeros_like(tensor.data) if tensor.grad is None else tensor.grad


def _key(action: Action) -> Key:
    assert action.microbatch is not None
    return action.stage, action.microbatch
