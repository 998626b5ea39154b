"""Elementwise optimizers over flat buffers: AdamW and gradient descent with momentum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm import kernels
from minillm.base.arrays import Array, namespace
from minillm.layout.flat import Run
from minillm.layout.sharding import overlap
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers, FlatState

CHUNK = 1 << 18  # elements at once where temporary arrays are needed: they stay in the cache

Accepts = Callable[[Run[Parameter]], bool]


class Part(NamedTuple):
    """Views of flat buffers that one kernel call updates."""

    values: Array
    grads: Array
    states: tuple[Array, ...]  # one for each state of the optimizer
    weight_decay: float
    rounded: Array | None  # takes the values in the model's narrow dtype
    rate: float = 1.0  # factor of the learning rate


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Decay applies to matrices and embeddings: where `Parameter.decay` is set. Where the buffers have
    masters, those are updated, and the model's narrow values are rounded from them in the same
    pass. `grad_scale` may be an array of one element on the device; NaN changes nothing.

    `cautious` decays only elements that the update does not take away from zero (Chen et al. 2025,
    arXiv:2510.12402). `of` accepts the runs that are updated, by default all.
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffers],
        *,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        cautious: bool = False,
        of: Accepts | None = None,
    ) -> None:
        self.buffers = tuple(buffers)
        self.beta1, self.beta2, self.eps, self.cautious = beta1, beta2, eps, cautious
        self._exp_avg = [FlatState(b, of=of) for b in self.buffers]
        self._exp_avg_sq = [FlatState(b, of=of) for b in self.buffers]
        self._parts = list(parts(self.buffers, [self._exp_avg, self._exp_avg_sq], weight_decay, of))
        if cautious:
            self._parts = [piece for part in self._parts for piece in chunks(part)]

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share of the parameters from the reduced gradient times `grad_scale`.

        `step` counts from 0.
        """
        for part in self._parts:
            cautious = self.cautious and part.weight_decay > 0
            old = part.values.copy() if cautious else part.values
            kernels.adamw_(
                part.values,
                part.grads,
                *part.states,
                lr=lr * part.rate,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=0.0 if cautious else part.weight_decay,
                step=step + 1,
                grad_scale=grad_scale,
                param_out=part.rounded,
            )
            if cautious:
                decay = lr * part.rate * part.weight_decay
                decayed = part.values - decay * shrinking(old, old - part.values)
                write(part.values, decayed, grad_scale)
                round_into(part.rounded, part.values)

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return the state by name, one entry a stage: what a checkpoint holds."""
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq} | masters(self.buffers)


class SGD:
    """Gradient descent with momentum (Sutskever et al. 2013, PMLR 28): plain without options.

    With g the gradient, weight decay added to it where `Parameter.decay` is set:
    buf = momentum * buf + g, p -= lr * buf.
    """

    def __init__(
        self, buffers: Sequence[FlatBuffers], *, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self.buffers, self.momentum = tuple(buffers), momentum
        self._momentum = [FlatState(b) for b in self.buffers] if momentum else []
        states = [self._momentum] if momentum else []
        self._parts = list(parts(self.buffers, states, weight_decay, None))
        if momentum or weight_decay:
            self._parts = [piece for part in self._parts for piece in chunks(part)]

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share from the reduced gradient times `grad_scale`."""
        for part in self._parts:
            grads, scale = part.grads, grad_scale
            if part.weight_decay:
                grads = scaled(grads, scale) + part.weight_decay * part.values
                scale = poisoned(scale)
            for buf in part.states:
                write(buf, self.momentum * buf + scaled(grads, scale), grad_scale)
                grads, scale = buf, poisoned(scale)
            kernels.sgd_(part.values, grads, lr=lr * part.rate, grad_scale=scale)
            round_into(part.rounded, part.values)

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return the momentum, if any, by name."""
        named = {"momentum": self._momentum} if self.momentum else {}
        return named | masters(self.buffers)


def parts(
    buffers: Sequence[FlatBuffers],
    states: Sequence[Sequence[FlatState]],
    weight_decay: float,
    of: Accepts | None,
) -> Iterator[Part]:
    """Yield the parts of this rank's share whose runs `of` accepts, each of one learning rate."""
    for number, held in enumerate(buffers):
        for run, shared in held.shared_runs():
            for rate, part in rated(run, shared) if of is None or of(run) else ():
                values, rounded = updated_parts(held, part)
                grads = held.at(held.grads, "grads", part)
                found = tuple(state[number].part(part) for state in states)
                yield Part(values, grads, found, weight_decay if run.decay else 0.0, rounded, rate)


def rated(run: Run[Parameter], part: slice) -> Iterator[tuple[float, slice]]:
    """Yield the stretches of `part` of a run whose parameters have one learning rate.

    Each entry is (factor of the rate, stretch). Gaps go with the parameter before them.
    """
    starts = [
        (rate, next(spans).start)
        for rate, spans in itertools.groupby(run.spans, lambda span: span.parameter.rate)
    ]
    stops = [start for _, start in starts[1:]] + [run.stop]
    for (rate, start), stop in zip(starts, stops, strict=True):
        common = overlap(slice(start, stop), part)
        if common.start < common.stop:
            yield rate, common


def chunks(part: Part) -> Iterator[Part]:
    """Yield a part in pieces of at most `CHUNK` elements."""
    for start in range(0, part.values.size, CHUNK):
        at = slice(start, start + CHUNK)
        rounded = None if part.rounded is None else part.rounded[at]
        states = tuple(state[at] for state in part.states)
        yield part._replace(
            values=part.values[at], grads=part.grads[at], states=states, rounded=rounded
        )


def updated_parts(buffers: FlatBuffers, part: slice) -> tuple[Array, Array | None]:
    """Return the slice `part` of what an optimizer updates, and of its narrow copy if any."""
    values = buffers.at(buffers.values, "values", part)
    if buffers.masters is None:
        return values, None
    return buffers.at(buffers.masters, "state", part), values


def masters(buffers: Sequence[FlatBuffers]) -> dict[str, Sequence[FlatState]]:
    """Return the masters as named state, if there are any."""
    found = [FlatState(b, b.masters) for b in buffers if b.masters is not None]
    return {"master": found} if found else {}


def shrinking(values: Array, update: Array) -> Array:
    """Return `values` where subtracting `update` does not take them away from zero, else 0."""
    return values * (values * update >= 0)


def poisoned(grad_scale: Any) -> Any:
    """Return 1, or NaN where `grad_scale` is: the factor of what it is in already."""
    return grad_scale * 0 + 1


def scaled(grads: Array, grad_scale: Any) -> Array:
    """Return `grads` times a number, or an array of one element, in the dtype of `grads`."""
    if isinstance(grad_scale, int | float):
        return grads * float(grad_scale)  # a NumPy scalar would widen the product
    return grads * grad_scale.astype(grads.dtype)


def write(target: Array, new: Array, grad_scale: Any) -> None:
    """Overwrite `target` unless `grad_scale` is NaN: the device decides without the host."""
    if isinstance(grad_scale, int | float):
        if grad_scale == grad_scale:
            target[...] = new
    else:
        target[...] = namespace(target).where(grad_scale == grad_scale, new, target)


def round_into(rounded: Array | None, values: Array) -> None:
    """Fill the model's narrow copy of `values`, if there is one."""
    if rounded is not None:
        kernels.cast(values, rounded.dtype, out=rounded)
