"""The one loop that executes any schedule: training on one rank, pipelines, evaluation.

A schedule is data (schedules.py, lower.py). The runtime looks up each action's kind in one dict and
calls the method found there; it has no notion of GPipe or 1F1B. Receives go into fresh buffers,
because the tape may still refer to the last ones. Sends are non-blocking and retired as the step
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from minillm.autograd.backward import WeightGradWork, backward
from minillm.autograd.tape import no_grad
from minillm.base.arrays import Array, namespace
from minillm.base.trace import Tracer
from minillm.comm.communicator import Communicator, Work
from minillm.pipeline.action import Action, ActionKind, Link, Schedule
from minillm.pipeline.stage import Live, Microbatch, Stage

_ONE = np.ones(())  # the gradient of the loss

Mailbox = dict[tuple[int, int], tuple[Array, ...]]
"""(destination stage, microbatch) -> the arrays for it. Computation puts and takes; a send takes
what is for another rank, a receive puts what came."""


class PipelineRuntime:
    """Executes one rank's row of a lowered schedule over its stages.

    `links` sends between the ranks of the pp axis; `optimizer_step` is called for OPTIMIZER_STEP
    with this rank's part of the loss. With `train` false, nothing is put on the tape.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        links: Communicator,
        *,
        train: bool = True,
        tracer: Tracer | None = None,
        optimizer_step: Callable[[Any], None] | None = None,
    ) -> None:
        self.schedule = schedule
        self.row = schedule.actions[links.rank]
        self.stages = dict(stages)
        self.links = links
        self.train = train
        self.tracer = tracer
        self.optimizer_step = optimizer_step
        self._arming = {_key(action) for action in schedule.arming}
        self._source = {link.dst_stage: link.src_stage for link in schedule.links}
        self._target = {link.src_stage: link.dst_stage for link in schedule.links}
        self._tags = {pair: tag for link in schedule.links for pair, tag in _link_tags(link)}
        self._methods: dict[ActionKind, Callable[[Action], None]] = {
            ActionKind.F: self._forward,
            ActionKind.B: self._backward,
            ActionKind.I: self._input_grad,
            ActionKind.W: self._weight_grad,
            ActionKind.SEND_F: self._send_activation,
            ActionKind.RECV_F: self._receive_activation,
            ActionKind.SEND_B: self._send_grad,
            ActionKind.RECV_B: self._receive_grad,
            ActionKind.TIE_REDUCE: self._tie_reduce,
            ActionKind.REDUCE_GRAD: self._reduce_grad,
            ActionKind.OPTIMIZER_STEP: self._optimizer_step,
        }

    def run(self, microbatches: Sequence[Microbatch], divisor: float) -> Any:
        """Execute the row. `divisor` is what the loss is divided by: the tokens of the global
        batch. Returns this rank's part of the loss, a sum over its microbatches (0 on ranks without
        the last stage): a number, or on a GPU an array without dims, for which nobody has
        waited."""
        self._microbatches, self._divisor = microbatches, divisor
        self._live: dict[tuple[int, int], Live] = {}
        self._activations: Mailbox = {}
        self._grads: Mailbox = {}
        self._sends: list[Work] = []
        self._losses: dict[int, Any] = {}
        for stage in self.stages.values():
            if stage.reducer is not None and self.train:
                stage.reducer.start_step()
        with nullcontext() if self.train else no_grad():
            for action in self.row:
                self._execute(action)
                if self._sends:
                    self._sends = [work for work in self._sends if not work.test()]
        for work in self._sends:
            work.wait()
        return sum(self._losses.values(), 0.0)

    def _execute(self, action: Action) -> None:
        if self.tracer is None:
            self._methods[action.kind](action)
            return
        with self.tracer.span(str(action), "compute"):
            self._methods[action.kind](action)

    def _forward(self, action: Action) -> None:
        stage, key = self.stages[action.stage], _key(action)
        live = stage.forward(
            self._activations.pop(key, None), self._microbatches[key[1]], self._divisor
        )
        if stage.last:
            loss = live.result[0].data
            self._losses[key[1]] = float(loss) if isinstance(loss, np.ndarray) else loss
        else:
            self._activations[self._target[action.stage], key[1]] = tuple(
                t.data for t in live.result
            )
        if self.train:
            self._live[key] = live

    def _backward(self, action: Action) -> None:
        self._differentiate(action, self._live.pop(_key(action)), None)

    def _input_grad(self, action: Action) -> None:
        live = self._live[_key(action)]
        self._differentiate(action, live, live.deferred)

    def _weight_grad(self, action: Action) -> None:
        reducer = self.stages[action.stage].reducer
        observer = None if reducer is None else reducer.observer
        deferred = self._live.pop(_key(action)).deferred
        deferred.reverse()
        while (
            deferred
        ):  # emptied, because each work refers to the list: a cycle that nobody would collect
            deferred.pop().run()
            if observer is not None:
                observer.between_nodes()

    def _differentiate(
        self, action: Action, live: Live, defer: list[WeightGradWork] | None
    ) -> None:
        """B or I: from the gradients of the stage's results to those of its inputs."""
        stage, key = self.stages[action.stage], _key(action)
        grads = (_ONE,) if stage.last else self._grads.pop(key)
        roots = list(zip(live.result, grads, strict=True))
        source, live.source, live.result = live.source, (), ()
        backward(
            roots,
            defer=defer,
            observer=stage.reducer.observer
            if stage.reducer is not None and self._arms(key)
            else None,
        )
        if not stage.first:
            self._grads[self._source[action.stage], key[1]] = tuple(t.grad for t in source)

    def _arms(self, key: tuple[int, int]) -> bool:
        """Whether this microbatch's backward is its stage's last of the step, so that finished
        gradients may be reduced."""
        return key in self._arming

    def _send_activation(self, action: Action) -> None:
        self._send(self._activations, self._target[action.stage], action)

    def _receive_activation(self, action: Action) -> None:
        self._receive(self._activations, self._source[action.stage], action)

    def _send_grad(self, action: Action) -> None:
        self._send(self._grads, self._source[action.stage], action)

    def _receive_grad(self, action: Action) -> None:
        self._receive(self._grads, self._target[action.stage], action)

    def _send(self, mailbox: Mailbox, to_stage: int, action: Action) -> None:
        rank, tag = self.schedule.rank_of_stage[to_stage], self._tag(action.stage, to_stage)
        for array in mailbox.pop((to_stage, _key(action)[1])):
            self._sends.append(self.links.isend(array, rank, tag))

    def _receive(self, mailbox: Mailbox, from_stage: int, action: Action) -> None:
        """Receive what a neighbour computed for `action.stage`, into fresh buffers: the tape may
        still refer to those of earlier microbatches."""
        key = _key(action)
        rank, tag = self.schedule.rank_of_stage[from_stage], self._tag(from_stage, action.stage)
        boundary = self.stages[action.stage].boundary(self._microbatches[key[1]].where)
        xp = namespace(self.stages[action.stage].buffers.values)
        arrays = tuple(
            xp.empty(spec.shape, spec.dtype)
            for spec in boundary
            if spec.differentiable or from_stage < action.stage
        )
        for array in arrays:
            self.links.recv(array, rank, tag)
        mailbox[key] = arrays

    def _tag(self, from_stage: int, to_stage: int) -> int:
        """One tag per link and direction, so that links between the same two ranks do not mix."""
        return self._tags[from_stage, to_stage]

    def _tie_reduce(self, action: Action) -> None:
        reducer = self.stages[action.stage].reducer
        assert reducer is not None
        reducer.tie_reduce()

    def _reduce_grad(self, action: Action) -> None:
        reducer = self.stages[action.stage].reducer
        assert reducer is not None
        reducer.finish()

    def _optimizer_step(self, action: Action) -> None:
        if self.optimizer_step is not None:
            self.optimizer_step(sum(self._losses.values(), 0.0))


def _link_tags(link: Link) -> list[tuple[tuple[int, int], int]]:
    """The message tags of a link: activations forward, gradients back."""
    forward, back = (link.src_stage, link.dst_stage), (link.dst_stage, link.src_stage)
    return [(forward, 2 * link.tag), (back, 2 * link.tag + 1)]


def _key(action: Action) -> tuple[int, int]:
    assert action.microbatch is not None
    return action.stage, action.microbatch
