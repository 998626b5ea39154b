"""Planted bugs of local steps, each seen by the comparison with virtual workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_local_steps as laws
from replication.virtual_workers import LOCAL
from training_helpers import Layout

from minillm.replication import local_steps
from minillm.replication.local_steps import LocalSteps, Worker
from minillm.training.batching import rows_of
from minillm.training.trainer import Trainer


def negated(plain: Callable[..., None]) -> Callable[..., None]:
    return lambda self, n, lr, momentum, parts: plain(self, n, -lr, momentum, parts)


def forgotten(plain: Callable[..., None]) -> Callable[..., None]:
    def outer_step(self: Worker, *args: Any) -> None:
        held = self.held.copy()
        plain(self, *args)
        self.held[...] = held

    return outer_step


def fed_with_means(plain: Callable[..., None]) -> Callable[..., None]:
    """Feed the momentum with the mean of the weights, where the difference belongs."""

    def outer_step(self: Worker, n: int, lr: float, momentum: float, parts: Any) -> None:
        for part in parts:
            held, theta, buf = self.held[part], self.other[part], self.momentum[part]
            buf[...] = momentum * buf + held / n
            theta -= lr * (theta - held / n + momentum * buf)
            held[...] = theta

    return outer_step


@pytest.mark.parametrize("bug", [negated, forgotten, fed_with_means])
def test_a_wrong_outer_step_is_seen(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "outer_step", bug(Worker.outer_step))
    with pytest.raises(AssertionError):
        laws.equals_the_simulation(Layout(dp=2))


def test_a_fragment_that_is_never_averaged_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    due = local_steps.due_fragment

    def never_the_second(*args: int) -> int | None:
        found = due(*args)
        return None if found == 1 else found

    monkeypatch.setattr(local_steps, "due_fragment", never_the_second)
    with pytest.raises(AssertionError):
        laws.equals_the_simulation(Layout(dp=2), fragments=2)


def test_another_order_of_data_after_a_sync_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each worker go on with the sequences of the next one."""

    def rows(self: Trainer) -> Any:
        turn = self._step // LOCAL["local_steps"]
        replica = (self._replica + turn) % len(self._deal)
        return rows_of(self._cut, self._deal, replica)

    monkeypatch.setattr(Trainer, "_rows", rows)
    with pytest.raises(AssertionError):
        laws.equals_the_simulation(Layout(dp=2))


@pytest.mark.parametrize("bug", ["averaged moments", "global gradient", "hook", "one norm"])
def test_a_wrong_worker_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check moments averaged at a sync, a gradient not times d, a reduction, a shared clip."""
    update, reduce = LocalSteps.update, LocalSteps.reduce

    def averaging(self: LocalSteps, optimizer: Any, step: int, lr: float, scale: Any) -> None:
        update(self, optimizer, step, lr, scale)
        if (step + 1) % self.every == 0:
            for states in optimizer.state().values():
                for state in states:
                    self.mesh.axis("dp").all_reduce_(state.array)
                    state.array /= self.num_workers

    def global_(self: LocalSteps, optimizer: Any, step: int, lr: float, scale: Any) -> None:
        update(self, optimizer, step, lr, scale / self.num_workers)

    def hooked(self: LocalSteps, stage: int) -> None:
        reduce(self, stage)
        self.mesh.axis("dp").all_reduce_(self.buffers[stage].grads)
        self.buffers[stage].grads /= self.num_workers

    if bug == "hook":
        monkeypatch.setattr(LocalSteps, "reduce", hooked)
    elif bug == "one norm":
        monkeypatch.setattr(LocalSteps, "workers", property(lambda self: (0, 1)))
    else:
        monkeypatch.setattr(
            LocalSteps, "update", averaging if bug == "averaged moments" else global_
        )
    with pytest.raises(AssertionError):
        laws.equals_the_simulation(Layout(dp=2), "sgd" if bug == "global gradient" else "adamw")
