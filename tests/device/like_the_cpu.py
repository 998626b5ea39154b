"""Checks of a model on the stand-in for a GPU: training and metrics are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from standin.install import installed
from test_step import FLOAT32, sizes
from training_helpers import Layout, Outcome, make_config, train

from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.tasks.protocol import Measure, Task
from minillm.training.assembly import assemble
from minillm.training.held_out import measure
from minillm.training.resolve import ResolvedConfig

Adapt = Callable[[ResolvedConfig], ResolvedConfig]
TRAINED = [Layout(), Layout(tp=2, sp=True)]
MEASURED = [Layout(), Layout(dp=2, pp=2)]


def measured_by(
    what: Callable[[], Measure], adapt: Adapt, layout: Layout, **changes: Any
) -> list[Any]:
    """Return what each rank measures of an encoder that `adapt` gives its family, in float32."""
    more = sizes("bert", dropout=0.0, dtype="float32", **changes)
    config = adapt(make_config("bert", layout, **more))

    def rank(comm: Communicator) -> Any:
        device = open_device(config.options.compute.device)
        world = on_device(comm, device, direct=False)
        model = assemble(config, world, training=False, std=0.1, device=device)
        return measure(model, what(), world, 3)

    return run_ranks(layout.num_ranks, rank)


def trained_by(task: Task, adapt: Adapt, layout: Layout, **changes: Any) -> Outcome:
    """Train an encoder that `adapt` gives its family for three steps, in float32."""
    more = sizes("bert", dropout=0.0, dtype="float32", batch=8, **changes)
    return train("bert", layout, steps=3, options={"task": task}, adapt=adapt, **more)


def check_training(task: Callable[[], Task], adapt: Adapt, layout: Layout) -> None:
    """Compare losses and norms of training on the device with those of one rank of the CPU."""
    wanted = trained_by(task(), adapt, Layout())
    with installed():
        found = trained_by(task(), adapt, layout, device="cuda")
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=FLOAT32)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=10 * FLOAT32)


def check_metrics(what: Callable[[], Measure], adapt: Adapt, layout: Layout, numbers: str) -> None:
    """Compare the loss and the array `numbers` of a measure likewise, equal on all ranks."""
    (wanted,) = measured_by(what, adapt, Layout())
    with installed():
        found, *others = measured_by(what, adapt, layout, device="cuda")
    assert all(np.array_equal(getattr(each, numbers), getattr(found, numbers)) for each in others)
    assert abs(found.loss - wanted.loss) <= FLOAT32 * wanted.loss
    np.testing.assert_array_equal(getattr(found, numbers), getattr(wanted, numbers))
