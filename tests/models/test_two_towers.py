"""A second kind of model runs through every mesh, schedule, checkpoint and evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import load_trainer, save_trainer
from models.two_towers import Config, Regression, SquaredError
from pipeline.placements import greedy, interleaved_ranks, v_ranks
from replication.gradient_server import GradientServer
from training_helpers import Layout, Outcome, assert_same, make_config, make_task, train

from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.training.held_out import measure
from minillm.training.trainer import Trainer

CONFIG = Config()
BATCH = 16


def run(layout: Layout, *, adapt: Any = None, **more: Any) -> Outcome:
    return train(
        "two-towers", layout, optimizer="adamw", options=more, adapt=adapt, rendezvous=True
    )


@pytest.fixture(scope="module")
def one_rank() -> Outcome:
    return run(Layout())


LAYOUTS = [
    Layout(dp=2),
    Layout(dp=4, num_microbatches=4),
    Layout(tp=2),
    Layout(tp=4, sp=True),
    Layout(pp=2, num_microbatches=4, schedule="gpipe"),
    Layout(pp=4, num_microbatches=2),
    Layout(pp=2, stage_layers="1,3", num_microbatches=1),
    Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_one_rank(layout: Layout, one_rank: Outcome) -> None:
    assert_same(run(layout), one_rank, 1e-8)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ranks", [interleaved_ranks(2, 2), v_ranks(2), (0, 1)])
def test_other_schedules(ranks: tuple[int, ...], split: bool, one_rank: Outcome) -> None:
    sizes = (4 // len(ranks),) * len(ranks)
    found = run(
        Layout(dp=2, pp=2, num_microbatches=4),
        adapt=lambda config: dataclasses.replace(config, stage_layers=sizes),
        schedule=greedy(ranks, 4, split=split),
    )
    assert_same(found, one_rank, 1e-8)


def test_other_methods_of_data_parallelism(one_rank: Outcome) -> None:
    assert_same(run(Layout(dp=2, pp=2), replicate=GradientServer), one_rank, 1e-8)


def test_each_loss_has_its_own_divisor(one_rank: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a bug: divide by the counts of the microbatch."""
    original = SquaredError.forward

    def local(ctx: Any, x: Any, *, target: Any, mask: Any, divisor: float) -> Any:
        return original(ctx, x, target=target, mask=mask, divisor=float(mask.sum()))

    monkeypatch.setattr(SquaredError, "forward", staticmethod(local))
    with pytest.raises(AssertionError):
        assert_same(run(Layout(dp=2, num_microbatches=2)), one_rank, 1e-8)


def _measured(layout: Layout, path: Path | None, save_to: Path | None) -> Any:
    config = make_config("two-towers", layout)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, make_task(config), std=0.25)
        if path is not None:
            load_trainer(trainer, path)
        steps = range(2, 4) if path is not None else range(2)
        losses = [trainer.step(step).loss for step in steps]
        if save_to is not None:
            save_trainer(trainer, save_to, 2)
        found = measure(trainer.model, Regression(CONFIG, BATCH), comm, config.microbatch)
        return losses, found

    return run_ranks(layout.num_ranks, rank)


def test_metrics_and_checkpoints_on_another_mesh(tmp_path: Path) -> None:
    """Measure ten rows, which do not divide over the ranks.

    Counts are summed, never averaged.
    """
    wide = Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2)
    (start,) = _measured(Layout(), None, tmp_path)
    path = tmp_path / "step-00000002"
    (expected,) = _measured(Layout(), path, None)
    assert start[1]["counted"] == expected[1]["counted"] > 0
    for losses, found in _measured(wide, path, None):
        np.testing.assert_allclose(losses, expected[0], rtol=1e-9)
        assert found["hits"] == expected[1]["hits"] and found["counted"] == expected[1]["counted"]
        for name in ("level", "value"):
            assert abs(found[name] - expected[1][name]) <= 1e-9 * expected[1][name]
