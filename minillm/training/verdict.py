"""Verdict on a step: permission to update the weights.

All ranks agree on the losses, the gradient norm and the clipping factor. On the CPU the numbers are
known at once. On a GPU they stay on the device: the optimizer's kernel reads the scale there, NaN
if the step must not update, and the host reads loss and norm later. A verdict is good only if the
one before it was, so no later step changes the weights before the host has seen a failure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.base.arrays import Array
from minillm.base.device import Device, Future
from minillm.base.errors import MinillmError
from minillm.comm.communicator import Communicator

CLIP_EPS = 1e-6  # added to the norm before division, as in PyTorch


class NotFinite(MinillmError):
    """Infinite or undefined loss or gradient of `step`; the weights are those before that step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Verdict:
    """Agreement on a step.

    `scale` is for the optimizer: a float, or an array of one element on the device, where `good`
    lies as well.
    """

    def __init__(
        self,
        step: int,
        names: Sequence[str],
        numbers: Future,
        scale: Any,
        good: Array | None,
        advice: str,
    ) -> None:
        self.step, self.scale, self.good = step, scale, good
        self._names, self._numbers, self._advice = names, numbers, advice

    def numbers(self) -> tuple[float, float]:
        """Return the sum of all losses and the norm, waiting for the device.

        Raises NotFinite, on all ranks alike.
        """
        loss, norm = self.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}, so this "
                f"update was not applied; {self._advice}",
                self.step,
            )
        return loss, norm

    def read(self) -> tuple[float, float]:
        """Return the sum of all losses and the norm, finite or not, waiting for the device."""
        *losses, norm = (float(number) for number in self._numbers.read())
        return sum(losses), norm

    def losses(self) -> dict[str, float]:
        """Return each loss by name, waiting for the device."""
        return dict(zip(self._names, map(float, self._numbers.read()), strict=False))

    def to_json(self) -> dict[str, Any]:
        """Return what is known of a step that is over as a JSON value, waiting for the device."""
        numbers = [float(number) for number in self._numbers.read()]
        return {"step": self.step, "names": list(self._names), "numbers": numbers}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Verdict:
        """Return the verdict that `to_json` has described; it permits no update any more."""
        return cls(found["step"], found["names"], Future(found["numbers"]), 0.0, None, "")


class Judge:
    """Decision maker of a run, on `device`.

    `names` are the losses of the model, the same on every rank. `max_norm` is the largest gradient
    norm, 0 for no limit. `advice` tells the user what to try after a failure.
    """

    def __init__(self, device: Device, names: Sequence[str], max_norm: float, advice: str) -> None:
        self.device, self.names, self.max_norm, self.advice = device, names, max_norm, advice
        self.last: Verdict | None = None

    def agree(
        self,
        ranks: Communicator,
        step: int,
        losses: Mapping[str, Any],
        squares: Any,
        workers: tuple[int, int] = (0, 1),
    ) -> Verdict:
        """Return the verdict on a step from this rank's parts of the losses and squared norm.

        The parts are floats, or arrays without dims on the device. `workers` are the index of
        this rank's worker and their number. Each clips by its own norm, and the verdict holds the
        root mean square of the norms. Collective over `ranks`.
        """
        own, number = workers
        norms = [squares if worker == own else 0.0 for worker in range(number)]
        parts = [*(losses.get(name, 0.0) for name in self.names), *norms]
        decide = self._on_host if self.device.on_host else self._on_device
        self.last = decide(ranks, step, parts, own)
        return self.last

    def _on_host(self, ranks: Communicator, step: int, parts: list[Any], own: int) -> Verdict:
        totals, count = ranks.reduce_numbers(parts), len(self.names)
        losses, squares = totals[:count], totals[count:]
        mean = sum(squares) / len(squares)
        norm = math.sqrt(mean) if mean >= 0 else math.nan
        clipped = math.sqrt(squares[own]) if mean >= 0 else math.nan
        scale = min(1.0, self.max_norm / (clipped + CLIP_EPS)) if self.max_norm else 1.0
        return Verdict(step, self.names, Future((*losses, norm)), scale, None, self.advice)

    def _on_device(self, ranks: Communicator, step: int, parts: list[Any], own: int) -> Verdict:
        xp, count = self.device.xp, len(self.names)
        totals = xp.zeros(len(parts), np.float64)
        for i, part in enumerate(parts):
            if not isinstance(part, int | float):  # a rank that computes no loss, or counts nothing
                totals[i] = part
        ranks.all_reduce_(totals, kind="control")
        clips = norm = xp.sqrt(totals[count + own : count + own + 1])
        if len(parts) > count + 1:
            norm = xp.sqrt(totals[count:].sum().reshape(1) / (len(parts) - count))
        good = xp.isfinite(totals[:count].sum().reshape(1)) & xp.isfinite(norm)
        if self.last is not None and self.last.good is not None:
            good &= self.last.good
        clipped = xp.ones(1, np.float64)
        if self.max_norm:
            clipped = xp.minimum(self.max_norm / (clips + CLIP_EPS), 1.0)
        scale = xp.where(good, clipped, math.nan).astype(np.float32)
        numbers = self.device.fetch(xp.concatenate([totals[:count], norm]))
        return Verdict(step, self.names, numbers, scale, good, self.advice)
