"""Optimizers over flat buffers, learning-rate schedules, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm import kernels
from minillm.base.arrays import Array, sum_dtype
from minillm.params.storage import FlatBuffers


class Part(NamedTuple):
    """Views of flat buffers that one kernel call updates; `rounded` takes the values in the model's
    own narrow dtype."""

    values: Array
    grads: Array
    exp_avg: Array
    exp_avg_sq: Array
    weight_decay: float
    rounded: Array | None


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): decoupled weight decay, applied only
    where `Parameter.decay` says so (matrices, embeddings).

    Where the buffers have masters, those are updated, and the model's narrow values are rounded
    from them in the same pass. `grad_scale` may be an array of one on the device; NaN leaves
    everything as it is.
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
        self._exp_avg = [
            b.memory.common(b.values.size, sum_dtype(b.values.dtype)) for b in self.buffers
        ]
        self._exp_avg_sq = [
            b.memory.common(b.values.size, sum_dtype(b.values.dtype)) for b in self.buffers
        ]
        self._parts = [
            part
            for args in zip(self.buffers, self._exp_avg, self._exp_avg_sq, strict=True)
            for part in self._cut(*args)
        ]

    def _cut(self, buffers: FlatBuffers, exp_avg: Array, exp_avg_sq: Array) -> Iterator[Part]:
        updated = buffers.values if buffers.masters is None else buffers.masters
        for run, part in buffers.shared_runs():
            rounded = None if buffers.masters is None else buffers.values[part]
            decay = self.weight_decay if run.decay else 0.0
            yield Part(
                updated[part], buffers.grads[part], exp_avg[part], exp_avg_sq[part], decay, rounded
            )

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share of the parameters from the reduced gradient times `grad_scale`;
        `step` counts from 0."""
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

    def state(self) -> Mapping[str, Mapping[int, Array]]:
        """State name -> id(parameter) -> local array in the parameter's shape, sharded as the
        parameter is: what a checkpoint holds."""
        named = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        masters = [b.masters for b in self.buffers if b.masters is not None]
        return {
            name: _views(self.buffers, flats)
            for name, flats in (named | ({"master": masters} if masters else {})).items()
        }


class SGD:
    """Plain gradient descent: p -= lr * grad_scale * grad."""

    def __init__(self, buffers: Sequence[FlatBuffers]) -> None:
        self.buffers = tuple(buffers)

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share of the parameters from the reduced gradient times
        `grad_scale`."""
        for buffers in self.buffers:
            part, values = buffers.share, buffers.values[buffers.share]
            updated = values if buffers.masters is None else buffers.masters[part]
            kernels.sgd_(updated, buffers.grads[part], lr=lr, grad_scale=grad_scale)
            if buffers.masters is not None:
                kernels.cast(updated, values.dtype, out=values)

    def state(self) -> Mapping[str, Mapping[int, Array]]:
        """SGD has no state."""
        return {}


def _views(buffers: Sequence[FlatBuffers], flats: Sequence[Array]) -> dict[int, Array]:
    return {
        key: view
        for b, flat in zip(buffers, flats, strict=True)
        for key, view in b.shaped(flat).items()
    }


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients are multiplied by so that their norm is at most `max_norm` (Pascanu et al.
    2013); 0 means no clipping."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup: int, steps: int, schedule: str
) -> float:
    """The rate of step `step` (from 0): linear warm-up over `warmup` steps, then cosine or linear
    decay to `min_lr` at `steps`, or constant."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "linear": 1.0 - done,
        "constant": 1.0,
    }[schedule]
    return min_lr + (lr - min_lr) * shape
