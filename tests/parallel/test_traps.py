"""Cells of the matrix that users of other trainers were bitten by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import load_trainer, save_trainer
from training_helpers import (
    INIT_STD,
    Layout,
    Outcome,
    assert_same,
    make_batches,
    make_config,
    reference,
    train,
)

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.batches import IGNORE_INDEX, Batches
from minillm.models.protocol import Batch
from minillm.tasks.language_model import LanguageModeling
from minillm.training.trainer import Trainer

# GPT-2, BERT and SmolLM2: none divides by 2 and 4 alike, and 50257 by neither.
VOCABULARIES = [50257, 30522, 49153]
SMALL: dict[str, Any] = dict(layers=2, heads=4, dim=8, ffn_dim=16, context=8, batch=4)


@pytest.mark.parametrize(
    ("vocab", "tied"),
    [
        pytest.param(vocab, tied, marks=() if i % 2 == tied else pytest.mark.matrix)
        for i, vocab in enumerate(VOCABULARIES, 1)
        for tied in (True, False)
    ],
)
def test_vocabularies_that_do_not_divide(vocab: int, tied: bool) -> None:
    changes = SMALL | {"vocab": vocab, "tied": tied}
    expected = train("gpt2", Layout(), steps=2, **changes)
    for layout in (Layout(tp=4, num_microbatches=2), Layout(tp=2, pp=2, sp=True)):
        assert_same(train("gpt2", layout, steps=2, **changes), expected, 1e-10)


class Ragged(LanguageModeling):
    """Language modelling with a number of counted targets that differs from row to row."""

    def batch(self, step: int, rows: np.ndarray, device: Any) -> Batch:
        made = super().batch(step, rows, device)
        return made._replace(
            arrays={**made.arrays, "targets": self._masked(made.arrays["targets"], rows)},
            divisors={"loss": float(self._counted(step))},
        )

    def _masked(self, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        counted = np.arange(targets.shape[1]) < (rows[:, None] * 5) % targets.shape[1]
        return np.where(counted, targets, IGNORE_INDEX)

    def _counted(self, step: int) -> int:
        rows = np.arange(self.batches.batch)
        _, targets = self.batches.microbatch(step, rows)
        return int((self._masked(targets, rows) != IGNORE_INDEX).sum())


def _ragged(layout: Layout) -> Outcome:
    task = Ragged(make_batches(make_config("gpt2", Layout())))
    return train("gpt2", layout, options={"task": task})


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, num_microbatches=4),
        Layout(pp=2, num_microbatches=4),
        Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2),
    ],
    ids=str,
)
def test_ragged_counts_of_targets(layout: Layout) -> None:
    """Train on rows with unequal counts of targets, one of them zero.

    Means of microbatches or ranks would differ.
    """
    assert_same(_ragged(layout), _ragged(Layout()), 1e-10)


def test_the_norm_itself_is_compared() -> None:
    """Check that a scaled gradient is detected by its norm.

    Adam hides it from losses and weights.
    """
    expected = reference("gpt2", "adamw")
    found = train("gpt2", Layout(dp=2), optimizer="adamw")
    assert_same(found, expected, 1e-9)
    scaled = Outcome(**{**vars(found), "norms": [2 * norm for norm in found.norms]})
    with pytest.raises(AssertionError):
        assert_same(scaled, expected, 1e-9)


def test_resume_in_the_second_epoch_on_another_mesh(tmp_path: Path) -> None:
    layouts = {"start": Layout(dp=2, num_microbatches=2), "end": Layout(tp=2, pp=2)}

    def run(layout: Layout, first: int, last: int, start: Path | None, end: Path | None) -> Any:
        config = make_config("gpt2", layout)
        tokens = np.random.default_rng(3).integers(0, config.model.vocab, 600)
        optimization = config.options.optimization
        batches = Batches(tokens, config.model.context, optimization.batch, optimization.seed)
        assert 2 * batches.batch < batches.num_sequences < 3 * batches.batch  # three steps an epoch

        def rank(comm: Communicator) -> list[float]:
            trainer = Trainer(config, comm, LanguageModeling(batches), std=INIT_STD)
            if start is not None:
                load_trainer(trainer, start)
            losses = [trainer.step(step).loss for step in range(first, last)]
            if end is not None:
                save_trainer(trainer, end, last)
            return losses

        return run_ranks(layout.num_ranks, rank)[0]

    expected = run(Layout(), 0, 8, None, None)
    assert_close(run(layouts["start"], 0, 4, None, tmp_path), expected[:4])
    resumed = run(layouts["end"], 4, 8, tmp_path / "step-00000004", None)
    assert_close(resumed, expected[4:])


def assert_close(found: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_context_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context"):
        train("gpt2", Layout(tp=4, sp=True), steps=1, context=18)
