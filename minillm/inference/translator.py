"""Translation with caches, over tensor-parallel ranks and stages.

The sources go through the encoder once, together with the first token of the targets. Each decoder
layer keeps the keys and values of its memory, and every further token costs one position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minillm.base.arrays import IntArray
from minillm.data.buckets import padded, padded_length
from minillm.inference.cache import Cache
from minillm.inference.decoding import Request, Rule, decode
from minillm.inference.engine import Generator
from minillm.inference.rows import Rows
from minillm.inference.sampling import Sampling
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits
from minillm.training.assembly import Assembly

GREEDY = Sampling(temperature=0)


class Translator(Generator):
    """Ranks of one dp coordinate that translate together. Collective over their tp and pp axes.

    `end` ends every sequence. `start` begins every target and is never chosen; None: `end` does.
    """

    inputs = "target"

    def __init__(self, model: Assembly, end: int, start: int | None = None) -> None:
        super().__init__(model, end + 1 if start is None else start)
        self.end, self.start = end, end if start is None else start

    def translate(
        self, sources: Sequence[IntArray], most: int | None = None, rule: Rule = GREEDY
    ) -> list[list[int]]:
        """Return the ids that `rule` chooses for each source, without the end. Equal on every rank.

        At most `most` tokens, and never more than the context holds.
        """
        room = min(most or self.context, self.context - 1)
        request = Request(prompt=[self.start], most=room, ends={self.end})
        searches = [rule.begin(request) for _ in sources]
        for _ in decode(Targets(self, sources), searches, rule):
            pass
        return [search.ids for search in searches]


class Targets(Rows):
    """Targets of `sources` [B], each with its end. Their first pass brings the sources."""

    def __init__(self, translator: Translator, sources: Sequence[IntArray]) -> None:
        super().__init__(translator, [[translator.start]] * len(sources))
        self._lengths = np.array([len(ids) for ids in sources], np.int64)
        size = int(padded_length(int(self._lengths.max()), translator.context))
        self._sources: IntArray | None = padded(sources, size, translator.end)

    def _num_parts(self) -> int:
        return 1 if self._sources is not None else super()._num_parts()

    def _batch(self, ids: IntArray, times: IntArray, cache: Cache) -> Batch:
        batch, sources = super()._batch(ids, times, cache), self._sources
        if sources is None:
            return batch
        self._sources = None
        arrays = {**batch.arrays, "source": self.generator.device.upload(sources)}
        return batch._replace(arrays=arrays, memory=KeyLimits(lengths=self._lengths))
