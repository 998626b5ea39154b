"""Held-out examples of a classifier, and intervals of their metrics by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_texts import EncodedTexts

RESAMPLES, SHARE = 1000, 0.95


class HeldOutTexts:
    """Part of a measure: the examples that the first `tokens` tokens fill, at least one."""

    def __init__(self, examples: EncodedTexts, context: int, tokens: int | None) -> None:
        self.examples, self.context = examples, context
        ends = np.cumsum(examples.lengths)  # tokens up to each example
        within = int(np.searchsorted(ends, tokens, "right")) if tokens else len(ends)
        self.num_rows = max(1, within)
        self.lengths = examples.lengths[: self.num_rows]

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the examples `rows` [B]."""
        return self.examples.batch(rows, self.context, Where(0, rows, device=device), {"loss": 1.0})


def intervals_of(
    names: Sequence[str], draw: Callable[[np.random.Generator], Mapping[str, float]]
) -> dict[str, list[float]]:
    """Return the 95 % interval of each metric by the percentile bootstrap (Efron 1979).

    `draw` returns the metrics of examples that are drawn again.
    """
    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(RESAMPLES)]
    found = [[each[name] for name in names] for each in drawn]
    ends = np.quantile(found, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0).T
    return {name: [float(end) for end in pair] for name, pair in zip(names, ends, strict=True)}
