"""Task protocol: training batches, losses, and how held-out data are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.models.protocol import Batch


class Task(Protocol):
    """Training objective: the batches of a step, and the losses that the model computes on them."""

    losses: Sequence[str]  # names, the same on every rank

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the sequences `rows` [B] of step `step`, arrays on `device`.

        A function of its arguments and the seed: any rank of any mesh can ask for any rows. The
        divisors count over the global batch of the step.
        """


class Measure(Protocol):
    """Metrics of a task on one data set. They follow from sums over all rows."""

    num_rows: int
    sums: Sequence[str]  # names of losses and counts that are added up, the same on every rank

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the examples `rows` [B], arrays on `device`, losses divided by 1."""

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return counts over the last stage's outputs, by name: hits, misses, ...

        {} where the losses are all that is needed.
        """

    def result(self, sums: Mapping[str, float]) -> Result:
        """Return the metrics from the sums over all rows."""


class Result(Protocol):
    """Metrics of a model on one data set."""

    def values(self) -> dict[str, float]:
        """Return what a line of metrics.jsonl holds."""

    def numbers(self) -> dict[str, Any]:
        """Return all metrics as a JSON value."""

    def describe(self) -> str:
        """Return the metrics that are shown while training goes on, as text."""

    def summary(self, of: int) -> str:
        """Return all metrics as text, and their share of the `of` tokens that exist."""
