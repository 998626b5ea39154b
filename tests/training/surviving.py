"""Training that survives lost ranks, on thread ranks, for tests."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from training_helpers import OPTIMIZERS, Layout, assemble, make_config, make_task, pieces

from minillm.comm.boards import Faults
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.training.resolve import ResolvedConfig, with_replicas
from minillm.training.survival import Loss, Respawn, Survivors, welcomed
from minillm.training.trainer import Trainer

STEPS = 3
SMALL: dict[str, Any] = dict(
    layers=2, dim=16, heads=4, ffn_dim=24, context=4, batch=12, bucket_mb=1.0
)
TOLERANCE = 1e-10


class Survived(NamedTuple):
    """Outcome on one rank: losses by step, weights, the losses of ranks, and where it ended."""

    losses: dict[int, float]
    norms: dict[int, float]
    weights: dict[str, Any]
    events: list[Loss]
    computed: list[int]  # steps that this rank has begun, in order
    left: bool
    calls: range  # numbers of its calls of communication, from the first step to the end
    mesh: MeshShape  # at the end
    place: int  # on that mesh


def configured(layout: Layout, model: str = "gpt2", **changes: Any) -> ResolvedConfig:
    return make_config(model, layout, **(SMALL | changes))


def survive(
    comm: Communicator,
    config: ResolvedConfig,
    faults: Faults | None = None,
    optimizer: str = "adamw",
    started: Callable[[], object] = lambda: None,
    respawns: bool = False,
) -> Survived:
    """Train on one rank, and go on after losses. `started` returns once all ranks have started."""
    respawn = Respawn(context=lambda: {"steps": STEPS}) if respawns else None
    return go_on(comm, config, faults, optimizer, started, respawn, comm.rank)


def join(comm: Communicator, config: ResolvedConfig, faults: Faults | None = None) -> Survived:
    """Take the place of a lost rank, and train to the end."""
    welcome = welcomed(comm)
    respawn = Respawn(context=lambda: welcome.run, welcome=welcome)
    now, number = with_replicas(config, welcome.dp), int(threading.current_thread().name.split()[1])
    return go_on(comm, now, faults, "adamw", lambda: None, respawn, number)


def go_on(
    comm: Communicator,
    config: ResolvedConfig,
    faults: Faults | None,
    optimizer: str,
    started: Callable[[], object],
    respawn: Respawn | None,
    number: int,
) -> Survived:
    events: list[Loss] = []
    found, norms, computed = {}, {}, []
    task = make_task(config)

    def make(config: ResolvedConfig, world: Communicator, commit: Any) -> Trainer:
        return Trainer(
            config, world, task, std=0.25, optimizer=OPTIMIZERS[optimizer], commit=commit
        )

    def recovered(survivors: Survivors, loss: Loss) -> None:
        events.append(loss)

    options = config.options.comm
    every = options.buddy_every * options.buddy
    survivors = Survivors(
        comm, config, make, recovered=recovered, respawn=respawn, buddy_every=every
    )
    started()  # a rank that is lost earlier ends the run
    is_new = respawn is not None and respawn.welcome is not None
    start = faults.calls[number] if faults and not is_new else 0

    def work() -> None:
        trainer = survivors.trainer
        for step in range(trainer.done, STEPS):
            survivors.keep()
            computed.append(step)
            report = trainer.step(step)
            found[step], norms[step] = report.loss, report.grad_norm

    stays = survivors.run(work)
    own = range(start + 1, faults.calls[number] + 1 if faults else 1)
    if faults is not None:
        faults.kills.pop(number, None)  # the copies below are no part of the run
    weights = pieces(survivors.trainer, "value") if stays else {}
    mesh, place = survivors.config.mesh, survivors.world.rank
    return Survived(found, norms, weights, events, computed, not stays, own, mesh, place)


def train(layout: Layout, faults: Faults | None = None, **changes: Any) -> list[Any]:
    config, started = configured(layout, **changes), threading.Barrier(layout.num_ranks).wait
    return run_ranks(
        layout.num_ranks,
        lambda comm: survive(comm, config, faults, started=started),
        timeout=10,
        faults=faults,
    )


@cache
def undisturbed(**changes: Any) -> Survived:
    """Return the outcome of one rank."""
    return train(Layout(), **changes)[0]


def calls(layout: Layout, faults: Faults | None = None) -> list[range]:
    """Return the numbers of the calls of each rank after its start; none of a dead one."""
    found = train(layout, faults or Faults())
    return [range(0) if one is None else one.calls for one in found]


def check(
    found: Sequence[Survived | None], expected: Survived, again: bool = False, repeats: int = 1
) -> list[Survived]:
    """Check that the survivors ended with the losses and weights of the undisturbed run.

    They repeat at most `repeats` steps for each loss, unless they begin `again`.
    """
    stayed = [one for one in found if one is not None and not one.left]
    for one in stayed:
        assert again or len(one.computed) <= STEPS + repeats * len(one.events), one.computed
        for step, loss in one.losses.items():
            assert math.isclose(loss, expected.losses[step], rel_tol=TOLERANCE), (step, loss)
            assert math.isclose(one.norms[step], expected.norms[step], rel_tol=TOLERANCE)
    weights = assemble([one.weights for one in stayed])
    for name, values in assemble([expected.weights]).items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-8, atol=1e-9, err_msg=name)
    return stayed


def some(numbers: range, most: int, first: int = 0) -> range:
    """Return at most `most` numbers that lie equally far apart."""
    return numbers[first :: max(1, -(-len(numbers) // most))]


def all_of(numbers: range, most: int, first: int = 0) -> range:
    return numbers


def many(numbers: range, most: int, first: int = 0) -> range:
    """Return eight times as many numbers as `some`, far apart alike."""
    return some(numbers, 8 * most, first % 3)


SELECTIONS = [
    some,
    pytest.param(many, marks=pytest.mark.slow),
    pytest.param(all_of, marks=pytest.mark.full),
]
LAYOUTS = [
    Layout(dp=2),
    Layout(dp=4),  # three are left for four microbatches
    Layout(dp=2, tp=2),
    Layout(dp=2, pp=2, num_microbatches=2),
]


def named(value: Any) -> str:
    """Return the id of a parameter: a function's str has its address."""
    return getattr(value, "__name__", str(value))
