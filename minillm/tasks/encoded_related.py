"""Texts that belong together as an encoder reads them: each text once, examples as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from minillm.base.arrays import IntArray
from minillm.data.related_texts import Related
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_texts import EncodedTexts, Encoder


class EncodedRelated:
    """Encoded examples of k texts each: anchor, positive, and with k = 3 a hard negative."""

    def __init__(self, examples: Sequence[Related], encoder: Encoder) -> None:
        numbers, k = dict[str, int](), max((len(each.texts) for each in examples), default=2)
        rows = [[numbers.setdefault(t, len(numbers)) for t in each.texts] for each in examples]
        self.rows = np.array(rows, np.int64).reshape(-1, k)
        """Numbers of the texts of each example [N, k]; equal texts have one number."""
        ids = encoder.encode([(text,) for text in numbers])
        self.texts = EncodedTexts(ids, np.arange(len(ids)))
        self.lengths = self.texts.lengths[self.rows]  # [N, k]
        scores = [each.score for each in examples]
        self.scores = None if None in scores or not scores else np.array(scores, np.float64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_texts(self) -> int:
        """Texts of an example: 2, or 3 with a hard negative."""
        return int(self.rows.shape[1])

    def batch(
        self, examples: IntArray, most: int, where: Where, divisors: Mapping[str, float]
    ) -> Batch:
        """Return examples [b] at `where`: all anchors, then all positives, then all negatives.

        The rows of the batch are its k b texts, at addresses of their own.
        """
        k = self.num_texts
        samples = (where.samples * k + np.arange(k)[:, None]).reshape(-1)
        texts = self.rows[examples].T.reshape(-1)
        found = self.texts.batch(
            texts, most, Where(where.step, samples, device=where.device), divisors
        )
        arrays = {**found.arrays, "texts": found.arrays["labels"]}
        arrays["anchors"] = arrays["texts"][: len(examples)]
        return found._replace(arrays=arrays)
