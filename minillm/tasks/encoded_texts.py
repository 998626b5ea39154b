"""Texts and pairs of texts as an encoder reads them, with a target for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.data.buckets import padded, padded_length
from minillm.data.documents import SpecialTokenizer, fitting
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where

Ids = tuple[IntArray, int]
"""Ids of a text or pair, marks included, and the number of those of type 0."""


class Encoder:
    """Encoder of texts as [CLS] A [SEP], and of pairs as [CLS] A [SEP] B [SEP], cut to `context`.

    Of a text that is too long the beginning is kept, of a pair the longer one is cut first.
    """

    def __init__(self, tokenizer: SpecialTokenizer, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.num_cut = 0
        """Texts that were cut so far."""

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Ids]:
        """Return the ids of each text or pair, and the number of those that are of type 0.

        Raises ConfigError for a text that has no ids.
        """
        flat = self.tokenizer.encode_pieces([part for parts in texts for part in parts])
        ids = iter(flat)
        return [self._joined([next(ids) for _ in parts]) for parts in texts]

    def _joined(self, parts: list[np.ndarray]) -> Ids:
        cls, sep = self.tokenizer.specials.cls, self.tokenizer.specials.sep
        room = self.context - 1 - len(parts)
        sizes: Sequence[int] = [min(len(parts[0]), room)]
        if len(parts) > 1:
            sizes = fitting(len(parts[0]), len(parts[1]), room)
        self.num_cut += sum(sizes) < sum(map(len, parts))
        marked = [np.append(ids[:size], sep) for ids, size in zip(parts, sizes, strict=True)]
        found = np.concatenate([[cls], *marked]).astype(np.int64)
        return found, 1 + len(marked[0])


class Located(Protocol):
    """Texts of a line of a file."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def line(self) -> int: ...


def refuse_long(
    encoder: Encoder, examples: Sequence[Located], source: str, *, apart: bool = False
) -> None:
    """Raise ConfigError naming the first example that `encoder` has cut, if any was.

    Texts of an example are encoded together, or each by itself if `apart`.
    """
    if not encoder.num_cut:
        return
    for each in examples:
        before = encoder.num_cut
        encoder.encode([(text,) for text in each.texts] if apart else [each.texts])
        if encoder.num_cut > before:
            raise ConfigError(
                f"line {each.line} of {source} has more than --context {encoder.context} "
                "tokens; use a larger one, or leave --no-truncate out"
            )


class EncodedTexts:
    """Encoded texts and their targets: a number each, or a row of numbers."""

    def __init__(self, texts: Sequence[Ids], labels: Sequence[int] | np.ndarray) -> None:
        self.ids, self.firsts = [ids for ids, _ in texts], np.array([n for _, n in texts], np.int64)
        self.labels = np.asarray(labels)  # [N], or [N, labels]
        self.lengths = np.array([len(ids) for ids in self.ids], np.int64)  # [N]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(
        self, numbers: IntArray, most: int, where: Where, divisors: Mapping[str, float]
    ) -> Batch:
        """Return the examples [B], as long as the longest of them, at most `most`."""
        lengths = self.lengths[numbers]
        length = int(padded_length(int(lengths.max(initial=1)), most))
        types = np.arange(length) >= self.firsts[numbers, None]
        arrays = {
            "tokens": padded([self.ids[i] for i in numbers], length, 0),
            "types": (types & (np.arange(length) < lengths[:, None])).astype(np.int64),
            "labels": self.labels[numbers],
        }
        upload = where.device.upload
        return Batch(
            {name: upload(array) for name, array in arrays.items()},
            divisors,
            Where(where.step, where.samples, np.arange(length), device=where.device),
            KeyLimits(lengths) if (lengths < length).any() else None,
        )
