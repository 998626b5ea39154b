"""Held-out data are not trained on: batches of an epoch share no sequence with what is measured."""

from __future__ import annotations

from pathlib import Path
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


def loaded(family: str, path: Path) -> Any:
    """Return the data of a file, with a byte as token."""
    options = RunConfig.of(family)().replace(train=str(path), tokenizer="byte", context=CONTEXT)
    return options.objective.load(options.corpus, options.shape, None, SelfCommunicator("test"))


@pytest.mark.parametrize("family", ["classifier", "tagger"])
def test_a_label_that_is_held_out_alone_is_known(family: str, tmp_path: Path) -> None:
    """Give 80 examples a common label, and 20 a label of their own, of which some are held out."""
    names = ["many"] * 80 + [f"rare{i}" for i in range(20)]
    if family == "classifier":
        path = tmp_path / "train.tsv"
        rows = [f"word{i}\t{name}\n" for i, name in enumerate(names)]
        path.write_text("text\tlabel\n" + "".join(rows))
    else:
        path = tmp_path / "train.conll"
        path.write_text("".join(f"Word{i}\tB-{name}\n\n" for i, name in enumerate(names)))
    data = loaded(family, path)
    assert (len(data.train), len(data.held_out)) == (90, 10)
    types = {label.removeprefix("B-") for label in data.labels}
    assert types >= set(names) and np.unique(data.train.labels).size < len(set(names)) + 2


def test_equal_texts_are_all_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "good\tx\ngood\ty\n" * 20)
    data = loaded("classifier", path)
    assert (len(data.train), len(data.held_out)) == (40, 0)
