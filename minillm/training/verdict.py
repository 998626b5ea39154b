"""Whether a step's update is to be: all ranks agree on the loss and on the gradient's norm, and by
what the gradient is scaled.

On the CPU the numbers are known at once. On a GPU they stay on the device: the scale is an array
that the optimizer's kernel reads, NaN if the step is not to be, and the host reads loss and norm
later. Until it has seen that a step failed, no further step changes anything either: a verdict is
good only if the one before it was.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minillm.base.arrays import Array
from minillm.base.device import CPU, Device, Later
from minillm.base.errors import MinillmError
from minillm.comm.communicator import Communicator
from minillm.training.optim import clip_scale


class NotFinite(MinillmError):
    """The loss or gradient of `step` was infinite or not a number; the weights are those before
    that step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Verdict:
    """What was agreed on a step. `scale` is for the optimizer: a number or an array of one on the
    device; `good` lives there, too."""

    def __init__(
        self, step: int, numbers: Later, scale: Any, good: Array | None, advice: str
    ) -> None:
        self.step, self.scale, self.good = step, scale, good
        self._numbers, self._advice = numbers, advice

    def numbers(self) -> tuple[float, float]:
        """Loss and norm; waits for them. Raises NotFinite, on all ranks alike."""
        loss, norm = (float(number) for number in self._numbers.read())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            text = f"step {self.step}: the loss is {loss} and the gradient norm {norm}, so this update was not applied"
            raise NotFinite(f"{text}; {self._advice}", self.step)
        return loss, norm


def judge(
    device: Device,
    world: Communicator,
    step: int,
    loss: Any,
    squares: Any,
    max_norm: float,
    before: Verdict | None,
    advice: str,
) -> Verdict:
    """Agree on a step from this rank's parts of the loss and of the squared norm, which are numbers
    or arrays without dims on the device. Collective.

    `before` is the last step's verdict, `advice` what a user may try where a step fails.
    """
    if device is CPU:
        loss, squares = world.reduce_numbers([loss, squares])
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        return Verdict(step, Later((loss, norm)), clip_scale(norm, max_norm), None, advice)
    xp = device.xp
    totals = xp.zeros(2, np.float64)
    for place, part in enumerate((loss, squares)):
        if not isinstance(
            part, int | float
        ):  # a rank without the last stage has no loss, and replicas count no squares: zero
            totals[place] = part
    world.all_reduce_(totals, kind="control")
    norm = xp.sqrt(totals[1:])
    good = xp.isfinite(totals[:1]) & xp.isfinite(norm)
    if before is not None and before.good is not None:
        good &= before.good
    clipped = xp.minimum(max_norm / (norm + 1e-6), 1.0) if max_norm else xp.ones(1, np.float64)
    scale = xp.where(good, clipped, math.nan).astype(np.float32)
    return Verdict(step, device.later(xp.concatenate([totals[:1], norm])), scale, good, advice)
