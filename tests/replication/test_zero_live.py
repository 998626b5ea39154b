"""Live bytes of ZeRO 3: never above the formula, after every action."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import test_zero as laws
from training_helpers import Layout

from minillm.autograd.tape import Context, value_of
from minillm.pipeline.action import Action, ActionKind
from minillm.replication.gather import Gatherer, Unit, unit_of
from minillm.replication.zones import Zone
from minillm.training.trainer import Trainer


class Watch:
    """Bytes of gathered values and of whole gradients that exist, and the most of them, by rank."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.alive: Counter[tuple[int, str]] = Counter()  # (id of the rank's memory, kind)
        self.most: Counter[tuple[int, str]] = Counter()
        self.bounds: dict[tuple[int, str], int] = {}
        launch, whole_grad = Gatherer._launch, Zone.whole_grad

        def launched(gatherer: Gatherer, unit: Unit) -> None:
            launch(gatherer, unit)
            for array in unit.arrays.values():  # type: ignore[union-attr]
                self._track(gatherer.buffers.memory, "values", array)

        def written(zone: Zone) -> Any:
            fresh, grad = zone._grad is None, whole_grad(zone)
            if fresh:
                self._track(zone.buffers.memory, "grads", grad)
            return grad

        patch.setattr(Gatherer, "_launch", launched)
        patch.setattr(Zone, "whole_grad", written)

    def _track(self, memory: Any, kind: str, array: Any) -> None:
        key = id(memory), kind
        self.alive[key] += array.nbytes
        self.most[key] = max(self.most[key], self.alive[key])
        weakref.finalize(array, self.alive.subtract, {key: array.nbytes})

    def follow(self, trainer: Trainer) -> None:
        """Check after every action that nothing lives behind the action that releases it."""
        execute, memory = trainer.runtime._execute, trainer.replication.memory
        blocks = Counter[str]()
        for buffers in trainer.model.buffers:
            for parameter in buffers.parameters:
                blocks[unit_of(parameter.name)] += parameter.spec.local_size(trainer.mesh.shape)
        largest = max(blocks.values()) * trainer.model.buffers[0].values.itemsize
        self.bounds |= {(id(memory), "values"): 2 * largest, (id(memory), "grads"): largest}

        def executed(action: Action) -> None:
            execute(action)
            if action.kind is ActionKind.RESHARD:
                assert not self.alive[id(memory), "values"], f"values are alive behind {action}"
            if action.kind is ActionKind.REDUCE_GRAD:
                assert not self.alive[id(memory), "grads"], f"gradients are alive behind {action}"

        trainer.runtime._execute = executed  # type: ignore[method-assign]

    def check(self) -> None:
        """Check the bounds: the block in use and the next one, and the gradient of a block."""
        assert self.bounds and self.most.keys() == self.bounds.keys()
        for key, bound in self.bounds.items():
            assert 0 < self.most[key] <= bound, (key, self.most[key], bound)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(laws.LAYOUTS[0], "none", marks=pytest.mark.slow),
        (laws.LAYOUTS[1], "selective"),
        (laws.LAYOUTS[2], "full"),
    ],
    ids=str,
)
def test_live_bytes_never_exceed_the_formula(
    layout: Layout, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    laws.train_zero("gpt2-untied", layout, 3, steps=2, recompute=recompute, prepare=watch.follow)
    watch.check()


@pytest.mark.parametrize("kind", ["saved array", "two blocks ahead", "kept behind the pass"])
@pytest.mark.slow
def test_memory_that_lives_too_long_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pinned(self: Context, i: int) -> Any:
        return value_of(self._inputs[i])

    def far(self: Gatherer) -> None:
        place = len(self._order)
        for unit in self._expected[place : place + 2]:
            if unit.arrays is None:
                self._launch(unit)

    faults = {
        "saved array": (Context, "input", pinned),
        "two blocks ahead": (Gatherer, "_prefetch", far),
        "kept behind the pass": (Gatherer, "drop", lambda gatherer: None),
    }
    monkeypatch.setattr(*faults[kind])
    watch = Watch(monkeypatch)
    with pytest.raises(AssertionError):
        laws.train_zero("gpt2-untied", laws.LAYOUTS[0], 3, steps=2, prepare=watch.follow)
        watch.check()
