"""Checkpoints of parameter servers: resumed to the bit, and by other methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_server as laws
from checkpoint_helpers import save_trainer, state_pieces
from served import Served, serve
from training_helpers import (
    Layout,
    assemble,
    train,
)

from minillm import checkpoint
from minillm.checkpoint.find import step_name
from minillm.training.trainer import Trainer


def saving(directory: Path, step: int) -> Callable[[Trainer], Any]:
    """Return a hook that saves after a run of `step` steps, and returns the state."""

    def save(trainer: Trainer) -> Any:
        save_trainer(trainer, directory, step)
        trainer.world.barrier()
        return state_pieces(trainer)

    return save


def resuming(directory: Path, step: int) -> Callable[[Trainer], None]:
    """Return a hook that loads the checkpoint of `step`."""
    return lambda trainer: trainer.load(checkpoint.CheckpointSource(directory / step_name(step)))


def state_of(found: Served) -> dict[str, np.ndarray]:
    return assemble(found.values, 0.0)


@pytest.mark.parametrize(
    ("mode", "layout", "servers"),
    [
        ("sync", Layout(dp=2, tp=2), 2),
        ("async", Layout(), 2),
        pytest.param("sync", Layout(dp=2, pp=2, num_microbatches=2), 1, marks=laws.SLOW),
        pytest.param("stale", Layout(), 0, marks=laws.SLOW),
        pytest.param("async", Layout(tp=2, pp=2, num_microbatches=2), 1, marks=laws.SLOW),
    ],
)
def test_a_resumed_run_has_the_bits_of_one_run(
    mode: str, layout: Layout, servers: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**laws.SMALL, "server": mode, "servers": servers}
    whole = serve("gpt2", layout, 4, after=saving(tmp_path, 4), **options)
    half = serve("gpt2", layout, 2, after=saving(tmp_path, 2), **options)
    load = resuming(tmp_path, 2)
    rest = serve("gpt2", layout, range(2, 4), prepare=load, after=saving(tmp_path, 5), **options)
    assert half.losses[0] + rest.losses[0] == whole.losses[0]
    expected = state_of(whole)
    for name, array in state_of(rest).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_sync_resumes_as_any_other_method(tmp_path: Path) -> None:
    served = serve("gpt2", Layout(dp=2), 2, after=saving(tmp_path, 2), **laws.SMALL, **laws.SYNC)
    expected = state_of(served)
    assert {name.split("/")[0] for name in expected} == {"model", "optimizer"}
    whole = train("gpt2", Layout(), optimizer="adamw", steps=4, **laws.SMALL)
    for layout, method in ((Layout(tp=2), {}), (Layout(dp=4), {"zero": 1})):
        found = serve(
            "gpt2", layout, range(2, 4), prepare=resuming(tmp_path, 2), **laws.SMALL, **method
        )
        np.testing.assert_allclose(found.losses[0], whole.losses[2:], rtol=1e-9)


def test_updates_are_counted_on_for_the_same_workers(tmp_path: Path) -> None:
    serve("gpt2", Layout(dp=2), 2, after=saving(tmp_path, 2), **laws.SMALL, **laws.ASYNC)
    load = resuming(tmp_path, 2)
    for workers, servers, first in ((2, 0, 4), (2, 2, 4), (4, 1, 2)):
        options: dict[str, Any] = {**laws.SMALL, "server": "async", "servers": servers}
        found = serve("gpt2", Layout(dp=workers), range(2, 3), prepare=load, **options)
        assert {log[0].applied for log in found.logs} == {first}
        assert {(line.clock, len(log)) for log in found.logs for line in log} == {(2, workers)}
