"""Checks of a model on the stand-in for a GPU: training and metrics are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from standin.install import installed
from test_step import FLOAT32
from training_helpers import Layout

from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.tasks.protocol import Measure
from minillm.training.assembly import assemble
from minillm.training.held_out import measure
from minillm.training.resolve import ResolvedConfig

TRAINED = [Layout(), Layout(tp=2, sp=True)]
MEASURED = [Layout(), Layout(dp=2, pp=2)]


def measured_by(config: ResolvedConfig, layout: Layout, what: Callable[[], Measure]) -> list[Any]:
    """Return what each rank measures on the device of the configuration."""

    def rank(comm: Communicator) -> Any:
        device = open_device(config.options.compute.device)
        world = on_device(comm, device, direct=False)
        model = assemble(config, world, training=False, std=0.1, device=device)
        return measure(model, what(), world, 3)

    return run_ranks(layout.num_ranks, rank)


def check_training(trained: Callable[..., Any], layout: Layout) -> None:
    """Compare losses and norms of `trained(layout, device="cuda")` with one rank of the CPU."""
    wanted = trained(Layout())
    with installed():
        found = trained(layout, device="cuda")
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=FLOAT32)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=10 * FLOAT32)


def check_metrics(measured: Callable[..., Any], layout: Layout, numbers: str) -> None:
    """Compare the loss and the array `numbers` of `measured(layout, device="cuda")` likewise."""
    wanted = measured(Layout())
    with installed():
        found = measured(layout, device="cuda")
    assert abs(found.loss - wanted.loss) <= FLOAT32 * wanted.loss
    np.testing.assert_array_equal(getattr(found, numbers), getattr(wanted, numbers))
