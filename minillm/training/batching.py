"""Batches of a run: the sequences of each step, and the microbatches that each rank computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.data.microbatches import Microbatches, by_positions, in_blocks, in_turn
from minillm.data.token_batches import TokenBatches
from minillm.models.protocol import Batch
from minillm.tasks.protocol import Budgeted, Dataset, Task, Unequal

if TYPE_CHECKING:
    from minillm.training.options import OptimizationOptions
    from minillm.training.resolve import ResolvedConfig


def batches_of(
    optimization: OptimizationOptions, data: Dataset, first: int = 0, step: int = 0
) -> int | TokenBatches:
    """Return the sequences of each step, or the batches by tokens, of which `first` are read.

    Raises ConfigError for batches by tokens of data whose lengths are not known or all alike.
    """
    if not (tokens := optimization.batch_tokens):
        return optimization.batch
    if not isinstance(data, Budgeted):
        raise ConfigError(
            f"--batch-tokens {tokens} needs examples or pairs of unequal lengths, but "
            f"{data.source} is read in sequences of --context tokens; use --batch"
        )
    more = dict(first=first, step=step)
    return TokenBatches(data.lengths, tokens, optimization.seed, shuffle=data.shuffled, **more)


def drawn(
    config: ResolvedConfig, data: Dataset, first: int = 0, step: int = 0
) -> tuple[Task, Callable[[int], int]]:
    """Return the batches of a run, and the function from a step to the sequences read before it.

    `first` sequences were read before step `step`. Raises ConfigError as `batches_of` does.
    """
    optimization, shape = config.options.optimization, config.model
    size = batches_of(optimization, data, first, step)
    if isinstance(size, TokenBatches):
        assert isinstance(data, Budgeted)
        return data.task(shape, batch=size, seed=optimization.seed), size.position
    # Number of the sequence in row 0 of step 0, as if the run had begun with these data.
    first -= step * size
    task = data.task(shape, batch=size, seed=optimization.seed, first=first)
    return task, lambda step: first + step * size


def microbatches_of(config: ResolvedConfig, task: Task, step: int) -> Microbatches:
    """Return the microbatches of a step on the replicas of the start, equally many on each."""
    optimization, ranks = config.options.optimization, config.planned_dp
    if not isinstance(task, Unequal):
        return in_blocks(optimization.batch, ranks, config.num_microbatches)
    if not optimization.batch_tokens:
        return in_turn(optimization.batch, ranks, config.num_microbatches)
    most = config.microbatch_tokens
    least = 1 if most else config.num_microbatches
    return by_positions(task.row_lengths(step).max(1), ranks, least, most)


def rows_of(cut: Microbatches, deal: Sequence[int], replica: int) -> Iterator[IntArray]:
    """Yield the rows of the global batch that a replica computes, by microbatches.

    `deal` are the microbatches of each replica, those of the first planned one first.
    """
    before = sum(deal[:replica])
    for number in range(before, before + deal[replica]):
        yield cut.rows(*divmod(number, cut.number))


def batch_of(task: Task, step: int, rows: IntArray, device: Device) -> Batch:
    """Return the sequences `rows` [B] of a step.

    A microbatch without a row is one that counts nothing: the first row, divided by infinity. Loss
    and gradients are then zero, and the replica takes part in all that its peers do.
    """
    if len(rows):
        return task.batch(step, rows, device)
    first = task.batch(step, np.zeros(1, np.int64), device)
    return first._replace(divisors=dict.fromkeys(first.divisors, math.inf))
