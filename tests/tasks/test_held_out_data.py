"""Held-out data are not trained on: batches of an epoch share no sequence with what is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minillm.base.device import CPU
from minillm.comm.single import SelfCommunicator
from minillm.data.labelled import split
from minillm.tasks import answering, chat, example_order, tagging, targets
from minillm.training.config import RunConfig, decided
from minillm.training.resolve import resolve

NUMBER, BATCH = 120, 8
BUILT_IN = {
    "classifier": (targets, "opinions"),
    "tagger": (tagging, "journeys"),
    "reader": (answering, "facts"),
    "chat": (chat, "errands"),
}
CONTEXT = 160  # bytes: no example is cut


def shared(family: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of held-out sequences that an epoch trains on, of a small built-in set."""
    module, name = BUILT_IN[family]
    make = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *of: make(*of)[:NUMBER])
    options = RunConfig.of(family)().replace(
        tokenizer="byte", context=CONTEXT, batch=BATCH, epochs=1.0, layers=1, heads=1, dim=8
    )
    comm = SelfCommunicator("test")
    data = options.objective.load(options.corpus, options.shape, None, comm)
    config = resolve(decided(options, data), 1, data.vocab_size)
    task, what = data.task(config.model, batch=BATCH, seed=1), data.measure(config.model, None)

    def rows(batch: Any) -> set[tuple[int, ...]]:
        return {tuple(np.trim_zeros(row, "b").tolist()) for row in batch.arrays["tokens"]}

    steps = config.options.optimization.steps
    trained = set().union(*(rows(task.batch(i, np.arange(BATCH), CPU)) for i in range(steps)))
    measured = rows(what.batch(np.arange(what.num_rows), CPU))
    assert len(measured) >= NUMBER // 20 and len(trained) >= NUMBER // 2
    return len(trained & measured)


@pytest.mark.parametrize("family", list(BUILT_IN))
def test_held_out_data_are_not_trained_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared(family, monkeypatch) == 0


@pytest.mark.parametrize("family", list(BUILT_IN))
def test_held_out_data_in_training_are_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(examples: Any) -> Any:
        return list(examples), split(examples)[1]

    monkeypatch.setattr(example_order, "split", leaking)
    assert shared(family, monkeypatch) >= NUMBER // 20
