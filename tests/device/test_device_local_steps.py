"""Local steps of device arrays: the weights of the CPU, and none after a bad step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from standin.install import installed
from test_device_matrix import scale
from test_step import FLOAT32, sizes
from training_helpers import Layout, assemble, compare, make_batches, make_config, pieces

from minillm.base.arrays import to_host
from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.tasks.language_model import LanguageModeling
from minillm.training.optim import SGD
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite


def trainer_of(comm: Communicator, device: str) -> Trainer:
    changes = sizes("gpt2", dtype="float32", device=device, local_steps=2)
    config, place = make_config("gpt2", Layout(dp=2), **changes), open_device(device)
    return Trainer(
        config,
        on_device(comm, place, False),
        LanguageModeling(make_batches(config)),
        std=scale(sizes("gpt2")),
        optimizer=SGD,
        device=place,
    )


def test_device_arrays_train_as_on_the_cpu() -> None:
    def rank(comm: Communicator, device: str) -> Any:
        trainer = trainer_of(comm, device)
        reports = [trainer.step(step) for step in range(3)]
        trainer.check_replicas()
        with trainer.replication.agreed():
            return [(r.loss, r.grad_norm) for r in reports], pieces(trainer, "value")

    expected = run_ranks(2, lambda comm: rank(comm, "cpu"))
    with installed():
        found = run_ranks(2, lambda comm: rank(comm, "cuda"))
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=16 * FLOAT32)
    weights = [assemble([each[1] for each in ranks], 0.0) for ranks in (found, expected)]
    compare(weights[0], weights[1], 16 * FLOAT32, "weights")


def test_a_bad_step_is_not_averaged() -> None:
    """Check that the host, one step late, finds the weights of before the step."""

    def rank(comm: Communicator) -> None:
        trainer = trainer_of(comm, "cuda")
        trainer.step(0)
        (buffers,), reduce = trainer.model.buffers, trainer.replication.reduce
        before = to_host(buffers.values).copy()

        def spoilt(stage: int) -> None:
            if comm.rank == 1:
                buffers.grads[3] = np.nan
            reduce(stage)

        trainer.replication.reduce = spoilt  # type: ignore[method-assign]
        report = trainer.step(1)
        np.testing.assert_array_equal(to_host(buffers.values), before)
        with pytest.raises(NotFinite):
            report.verdict.numbers()

    with installed(), np.errstate(all="ignore"):
        run_ranks(2, rank)
