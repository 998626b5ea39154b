"""Proof of the proof: classic bugs of parallel training, planted.

Each makes the comparison with one rank fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from training_helpers import Layout, assert_same, reference, train

from minillm.nn import vocabulary
from minillm.nn.dropout import Dropout
from minillm.parallel import collectives
from minillm.params.where import Pass
from minillm.pipeline import runtime
from minillm.replication import all_reduce
from minillm.replication.protocol import Replication
from minillm.tasks.language_model import LanguageModeling

Patch = pytest.MonkeyPatch


def _drop_backward_all_reduce(patch: Patch) -> None:
    patch.setattr(
        collectives._CopyTo,
        "backward",
        staticmethod(lambda ctx, grad_outs, needs, into: (grad_outs[0],)),
    )


def _forget_tied_sum(patch: Patch) -> None:
    patch.setattr(Replication, "reduce_ties", lambda self: None)


def _receive_into_live_buffer(patch: Patch) -> None:
    """Reuse one buffer per stage, a plausible optimization."""

    def receive(self: Any, mailbox: Any, from_stage: int, action: Any, specs: Any) -> None:
        held = self.__dict__.setdefault("_held", {})
        fresh = {}
        original(self, fresh, from_stage, action, specs)
        for key, arrays in fresh.items():
            kept = held.setdefault((from_stage, key[0]), tuple(np.empty_like(a) for a in arrays))
            for target, array in zip(kept, arrays, strict=True):
                target[...] = array
            mailbox[key] = kept

    original = runtime.PipelineRuntime._receive
    patch.setattr(runtime.PipelineRuntime, "_receive", receive)


def _scale_by_microbatch(patch: Patch) -> None:
    original = LanguageModeling.batch

    def batch(self: LanguageModeling, step: int, rows: Any, device: Any) -> Any:
        made = original(self, step, rows, device)
        return made._replace(divisors={"loss": float(made.arrays["targets"].size)})

    patch.setattr(LanguageModeling, "batch", batch)


def _count_norm_twice(patch: Patch) -> None:
    def parts(flat: Any, *args: Any) -> Any:
        return ((slice(run.start, run.stop), True) for run in flat.runs)

    patch.setattr(all_reduce, "counted_parts", parts)


def _dropout_by_local_index(patch: Patch) -> None:
    original = Dropout.forward

    def forward(self: Dropout, x: Any, pass_: Pass) -> Any:
        local = dataclasses.replace(pass_.where, samples=np.arange(len(pass_.where.samples)))
        return original(self, x, dataclasses.replace(pass_, where=local))

    patch.setattr(Dropout, "__call__", forward)


def _vocabulary_off_by_one(patch: Patch) -> None:
    original = vocabulary._VocabSlice.__init__

    def init(self: Any, weight: Any, comm: Any, vocab: int) -> None:
        original(self, weight, comm, vocab)
        self.first_class += comm.rank > 0

    patch.setattr(vocabulary._VocabSlice, "__init__", init)


def _forget_last_microbatch(patch: Patch) -> None:
    original = runtime.PipelineRuntime.__init__

    def init(self: Any, schedule: Any, *args: Any, **kwargs: Any) -> None:
        original(self, schedule, *args, **kwargs)
        last = schedule.num_microbatches - 1
        self.row = tuple(action for action in self.row if action.microbatch != last)

    patch.setattr(runtime.PipelineRuntime, "__init__", init)


BUGS: dict[str, tuple[Callable[[Patch], None], Layout]] = {
    "dropped tp all-reduce in backward": (_drop_backward_all_reduce, Layout(tp=2)),
    "missing tied-embedding sum": (_forget_tied_sum, Layout(pp=2, num_microbatches=2)),
    "receive into a live buffer": (
        _receive_into_live_buffer,
        Layout(pp=2, schedule="gpipe", num_microbatches=4),
    ),
    "microbatch scaling off": (_scale_by_microbatch, Layout(num_microbatches=2)),
    "norm counted twice": (_count_norm_twice, Layout(tp=2)),
    "norm of the tied weight counted twice": (_count_norm_twice, Layout(pp=2, num_microbatches=2)),
    "dropout by local index": (_dropout_by_local_index, Layout(dp=2)),
    "off-by-one vocabulary range": (_vocabulary_off_by_one, Layout(tp=2)),
    "missing last microbatch": (_forget_last_microbatch, Layout(num_microbatches=2)),
    "missing last microbatch in a pipeline": (
        _forget_last_microbatch,
        Layout(pp=2, num_microbatches=4),
    ),
}


@pytest.mark.parametrize("name", list(BUGS))
def test_planted_bug_is_caught(name: str, monkeypatch: Patch) -> None:
    plant, layout = BUGS[name]
    expected = reference("gpt2", steps=2)
    assert_same(train("gpt2", layout, steps=2), expected, 1e-10)  # right without the bug
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(train("gpt2", layout, steps=2), expected, 1e-10)
