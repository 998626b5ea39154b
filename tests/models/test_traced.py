"""Spans of layers: one each for forward and backward, within the actions, without another bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layouts import Layout
from training_helpers import make_batches, make_config

from minillm.base.trace import Tracer
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.tasks.language_model import LanguageModeling
from minillm.training.trainer import Trainer


def traced(layout: Layout, trace: bool, **changes: Any) -> list[tuple[list[Any], list[np.ndarray]]]:
    """Return the spans of each rank's second step, and its weights."""
    config = make_config("gpt2", layout, dtype="float32", **changes)

    def rank(comm: Communicator) -> tuple[list[Any], list[np.ndarray]]:
        tracer = Tracer(comm.rank) if trace else None
        task = LanguageModeling(make_batches(config))
        trainer = Trainer(config, comm, task, tracer=tracer)
        trainer.step(0)
        before = 0 if tracer is None else len(tracer._events)
        trainer.step(1)
        values = [stage.buffers.values.copy() for stage in trainer.model.stages.values()]
        return ([] if tracer is None else tracer._events[before:]), values

    return run_ranks(layout.num_ranks, rank)


def names(events: list[Any]) -> list[str]:
    return [event["name"] for event in events if event["name"][0].islower()]


FORWARD = ["embedding forward", *(f"block {i} forward" for i in range(4)), "head forward"]
BACKWARD = ["head backward", *(f"block {i} backward" for i in (3, 2, 1, 0)), "embedding backward"]
REPLAYED = [
    "head backward",
    *(f"block {i} {way}" for i in (3, 2, 1, 0) for way in ("forward", "backward")),
    "embedding backward",
]


@pytest.mark.parametrize(
    ("recompute", "backward"), [("none", BACKWARD), ("selective", BACKWARD), ("full", REPLAYED)]
)
def test_each_layer_has_its_spans_and_no_other_bit(recompute: str, backward: list[str]) -> None:
    ((events, values),) = traced(Layout(), True, recompute=recompute)
    ((nothing, expected),) = traced(Layout(), False, recompute=recompute)
    assert names(events) == FORWARD + backward and nothing == []
    for found, wanted in zip(values, expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
    # The parts fill the actions that they are in.
    parts = [event for event in events if event["name"][0].islower()]
    whole = [event for event in events if event["name"][-1].isdigit()]
    assert len(whole) == 2
    assert sum(e["dur"] for e in parts) == pytest.approx(sum(e["dur"] for e in whole), rel=0.01)


def test_stages_have_the_spans_of_their_layers() -> None:
    (first, _), (last, _) = traced(Layout(pp=2, num_microbatches=1), True)
    assert names(first) == [*FORWARD[:3], *BACKWARD[3:]]
    assert names(last) == [*FORWARD[3:], *BACKWARD[:3]]
