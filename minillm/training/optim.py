"""Optimizers over flat buffers, and learning-rate schedules."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm import kernels
from minillm.base.arrays import Array
from minillm.params.storage import FlatBuffers, FlatState
from minillm.training.options import OptimizationOptions


class Part(NamedTuple):
    """Views of flat buffers that one kernel call updates."""

    values: Array
    grads: Array
    exp_avg: Array
    exp_avg_sq: Array
    weight_decay: float
    rounded: Array | None  # takes the values in the model's narrow dtype


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Decay applies to matrices and embeddings: where `Parameter.decay` is set. Where the buffers have
    masters, those are updated, and the model's narrow values are rounded from them in the same
    pass. `grad_scale` may be an array of one element on the device; NaN changes nothing.
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffers],
        *,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.buffers = tuple(buffers)
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self._exp_avg = [FlatState(b) for b in self.buffers]
        self._exp_avg_sq = [FlatState(b) for b in self.buffers]
        self._parts = [
            part
            for args in zip(self.buffers, self._exp_avg, self._exp_avg_sq, strict=True)
            for part in self._cut(*args)
        ]

    def _cut(
        self, buffers: FlatBuffers, exp_avg: FlatState, exp_avg_sq: FlatState
    ) -> Iterator[Part]:
        for run, part in buffers.shared_runs():
            values, rounded = updated_parts(buffers, part)
            grads = buffers.at(buffers.grads, "grads", part)
            moments = exp_avg.part(part), exp_avg_sq.part(part)
            yield Part(values, grads, *moments, self.weight_decay if run.decay else 0.0, rounded)

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share of the parameters from the reduced gradient times `grad_scale`.

        `step` counts from 0.
        """
        for part in self._parts:
            kernels.adamw_(
                part.values,
                part.grads,
                part.exp_avg,
                part.exp_avg_sq,
                lr=lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=part.weight_decay,
                step=step + 1,
                grad_scale=grad_scale,
                param_out=part.rounded,
            )

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return the state by name, one entry a stage: what a checkpoint holds."""
        masters = [FlatState(b, b.masters) for b in self.buffers if b.masters is not None]
        named = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        return named | ({"master": masters} if masters else {})


class SGD:
    """Gradient descent without momentum: p -= lr * grad_scale * grad."""

    def __init__(self, buffers: Sequence[FlatBuffers]) -> None:
        self.buffers = tuple(buffers)

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share from the reduced gradient times `grad_scale`."""
        for buffers in self.buffers:
            for part in buffers.parts:
                values, rounded = updated_parts(buffers, part)
                grads = buffers.at(buffers.grads, "grads", part)
                kernels.sgd_(values, grads, lr=lr, grad_scale=grad_scale)
                if rounded is not None:
                    kernels.cast(values, rounded.dtype, out=rounded)

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return nothing: plain gradient descent has no state."""
        return {}


def maker(options: OptimizationOptions, kind: type[AdamW] | type[SGD] = AdamW) -> Any:
    """Return a function that makes the optimizer of the options from flat buffers."""
    if kind is SGD:
        return SGD
    return functools.partial(
        AdamW, beta1=options.beta1, beta2=options.beta2, weight_decay=options.weight_decay
    )


def updated_parts(buffers: FlatBuffers, part: slice) -> tuple[Array, Array | None]:
    """Return the slice `part` of what an optimizer updates, and of its narrow copy if any."""
    values = buffers.at(buffers.values, "values", part)
    if buffers.masters is None:
        return values, None
    return buffers.at(buffers.masters, "state", part), values


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup: int, steps: int, schedule: str
) -> float:
    """Return the rate of step `step` (from 0).

    Linear warm-up over `warmup` steps, then cosine or linear decay to `min_lr` at `steps`, or
    constant.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "linear": 1.0 - done,
        "constant": 1.0,
    }[schedule]
    return min_lr + (lr - min_lr) * shape
