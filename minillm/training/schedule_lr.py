"""Learning-rate schedules: one table of functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Moment(NamedTuple):
    """Place of a step after the warm-up."""

    done: float  # share of the steps after the warm-up that lie behind, from 0 to 1
    passed: float  # step divided by the first step after the warm-up, both from 1: 1 or more
    decay_share: float  # option --decay-share: share of all steps
    after_warmup: float  # share of all steps that lie after the warm-up


class Schedule(NamedTuple):
    """Schedule: the height between the lowest and the highest rate, from 0 to 1."""

    height: Callable[[Moment], float]
    to_zero: bool = False  # the lowest rate is 0, whatever --min-lr says


def _cosine(at: Moment) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * at.done))


def _linear(at: Moment) -> float:
    return 1.0 - at.done


def _constant(at: Moment) -> float:
    return 1.0


def _stable_then_linear(at: Moment) -> float:
    """Stay up, then fall linearly over the last `decay_share` of all steps."""
    left = (1.0 - at.done) * at.after_warmup
    return min(1.0, left / at.decay_share)


def _inverse_root(at: Moment) -> float:
    return 1.0 / math.sqrt(at.passed)


LR_SCHEDULES = {
    "cosine": Schedule(_cosine),  # Loshchilov and Hutter 2017, arXiv:1608.03983
    "linear": Schedule(_linear),
    "linear-to-zero": Schedule(_linear, to_zero=True),
    "constant": Schedule(_constant),
    "wsd": Schedule(_stable_then_linear),  # Hu et al. 2024, arXiv:2404.06395
    "noam": Schedule(_inverse_root, to_zero=True),  # Vaswani et al. 2017, equation 3
    "inverse-sqrt": Schedule(_inverse_root),
}


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup: int,
    steps: int,
    schedule: str,
    decay_share: float = 0.2,
) -> float:
    """Return the rate of step `step` (from 0).

    It rises linearly over `warmup` steps, then follows the schedule from `lr` towards `min_lr`.
    Schedules that end do so at `steps`, one step after the last.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    after = max(1, steps - warmup)
    at = Moment(
        done=min(1.0, (step - warmup) / after),
        passed=(step + 1) / (warmup + 1),
        decay_share=decay_share,
        after_warmup=after / max(1, steps),
    )
    return min_lr + (lr - min_lr) * LR_SCHEDULES[schedule].height(at)
