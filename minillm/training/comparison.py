"""Comparison of a run on a mesh with the same run on one rank: law 1, "one answer", as a tool.

What a checkpoint holds is compared, so the comparison needs to know neither the model nor the
method of data parallelism. After the first step AdamW's first moments are the clipped gradient
times (1 - beta1); after the last one, weights and moments show everything that happened since.

Rounding differs on every mesh, so equality needs a scale. One rank runs twice, in float64 and in
the run's own dtype; their distance is the rounding to expect of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.base.arrays import to_host
from minillm.checkpoint import StateTensor
from minillm.comm.communicator import Communicator
from minillm.layout.sharding import slice_shape
from minillm.training.trainer import Trainer

SAFETY = 8.0  # a mesh sums in another order: its error is like the expected one, not equal to it
FLOOR = 64.0  # units of the dtype's epsilon that are always allowed

State = dict[str, np.ndarray]
"""Tensor name -> global array, float64."""


@dataclass
class Course:
    """Numbers of a run: losses and gradient norms of all steps, state after the first and last."""

    losses: list[float]
    norms: list[float]
    first: Any
    last: Any


@dataclass(frozen=True)
class Deviation:
    """Relative distance of a quantity from the float64 run on one rank."""

    name: str
    expected: float  # of one rank in the run's dtype
    seen: float  # of the mesh
    limit: float

    @property
    def agrees(self) -> bool:
        """True if rounding explains the difference. NaN does not agree."""
        return self.seen <= self.limit


def run(trainer: Trainer, steps: int, keep: Callable[[Sequence[StateTensor]], Any]) -> Course:
    """Run `steps` steps; `keep` copies the state after the first and the last one."""
    losses, norms, first = [], [], None
    for step in range(steps):
        report = trainer.step(step)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        if step == 0:
            first = keep(_of_any_mesh(trainer))
    return Course(losses, norms, first, keep(_of_any_mesh(trainer)))


def _of_any_mesh(trainer: Trainer) -> list[StateTensor]:
    """Return the state that has the same shape on every mesh."""
    return [tensor for tensor in trainer.state() if not tensor.fallback]


def whole(trainer: Trainer) -> Callable[[Sequence[StateTensor]], State]:
    """Return a function that copies the state of a run on one rank as global arrays."""
    copy = pieces(trainer)

    def keep(tensors: Sequence[StateTensor]) -> State:
        found = {tensor.name: np.empty(tensor.spec.shape) for tensor in tensors}
        for name, globally, block in copy(tensors):
            found[name][globally] = block
        return found

    return keep


def pieces(trainer: Trainer) -> Callable[[Sequence[StateTensor]], list[tuple[str, Any, Any]]]:
    """Return a function that copies this rank's blocks as (name, global slices, float64 array)."""
    mesh = trainer.mesh

    def keep(tensors: Sequence[StateTensor]) -> list[tuple[str, Any, Any]]:
        trainer.world.barrier()  # shared memory: all ranks have updated
        return [
            (tensor.name, globally, _block(tensor, globally, locally))
            for tensor in tensors
            for globally, locally in tensor.spec.pieces(mesh.shape, mesh.coords)
        ]

    return keep


def compare(
    world: Communicator,
    mesh: Course,
    truth: Course | None,
    own: Course | None,
    epsilon: float,
) -> list[Deviation]:
    """Return the deviations of all quantities, the worst first; the same on every rank.

    The first rank has the courses of one rank, `truth` in float64 and `own` in the run's dtype.
    Collective over `world`.
    """
    found = []
    for name in ("losses", "norms"):
        exact = world.broadcast_json(getattr(truth, name, None))
        rounded = world.broadcast_json(getattr(own, name, None))
        for step, (a, b, c) in enumerate(zip(exact, rounded, getattr(mesh, name), strict=True)):
            label = f"{name[:-1] if name == 'norms' else 'loss'} of step {step + 1}"
            found.append(_deviation(label, _relative(b - a, a), _relative(c - a, a), epsilon))
    for when, what in (("first", "after step 1"), ("last", f"after step {len(mesh.losses)}")):
        found += _tensors(world, mesh, truth, own, when, what, epsilon)
    return sorted(found, key=lambda d: d.seen / d.limit if d.seen == d.seen else math.inf)[::-1]


def _tensors(
    world: Communicator,
    mesh: Course,
    truth: Course | None,
    own: Course | None,
    when: str,
    what: str,
    epsilon: float,
) -> list[Deviation]:
    exact: State = getattr(truth, when, {})
    rounded: State = getattr(own, when, {})
    found = []
    shapes = world.broadcast_json([[name, list(array.shape)] for name, array in exact.items()])
    for name, shape in shapes:
        a = exact[name] if truth is not None else np.empty(shape)
        world.broadcast_(a, 0, kind="control")
        norm = float(np.linalg.norm(a))
        expected = 0.0
        if own is not None:
            expected = _relative(float(np.linalg.norm(rounded[name] - a)), norm)
        errors = [
            [[[part.start, part.stop] for part in at], float(np.sum((block - a[at]) ** 2))]
            for held, at, block in getattr(mesh, when)
            if held == name
        ]
        # Replicas hold equal blocks: of each block the worst copy counts.
        worst: dict[str, float] = {}
        for rank in world.gather_json(errors):
            for at, error in rank:
                worst[str(at)] = max(error, worst.get(str(at), 0.0), key=_nan_first)
        seen = _relative(math.sqrt(sum(worst.values())), norm)
        expected = world.broadcast_json(expected)
        found.append(_deviation(f"{name} {what}", expected, seen, epsilon))
    return found


def _deviation(name: str, expected: float, seen: float, epsilon: float) -> Deviation:
    return Deviation(name, expected, seen, SAFETY * expected + FLOOR * epsilon)


def _block(tensor: StateTensor, globally: Any, locally: Any) -> np.ndarray:
    return to_host(tensor.data)[locally].reshape(slice_shape(globally)).astype(np.float64)


def _relative(error: float, scale: float) -> float:
    return abs(error) / (abs(scale) or 1.0)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value
