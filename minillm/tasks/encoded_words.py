"""Words of sentences as an encoder reads them, with a label at the first piece of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minillm.base.arrays import IntArray
from minillm.data.batches import IGNORE_INDEX
from minillm.data.buckets import padded, padded_length
from minillm.data.documents import SpecialTokenizer
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where

BLANK = "\u0120"  # how byte-level vocabularies spell the blank before a word


class Pieces(NamedTuple):
    """Sentence as [CLS] pieces [SEP], and the words that begin in it."""

    ids: IntArray  # [L], marks included
    firsts: IntArray  # [P] position of the first piece of each word
    words: IntArray  # [P] number of that word in the sentence


class WordEncoder:
    """Encoder of words, each by itself, cut to `context` tokens."""

    def __init__(self, tokenizer: SpecialTokenizer, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.num_cut = 0
        """Sentences that were cut so far."""
        find = getattr(tokenizer.base, "token_id", lambda token: None)
        self._before = " " if find(BLANK) is not None else ""

    @property
    def most_words(self) -> int:
        """Words of a sentence that may have a label."""
        return self.context - 2

    def encode(self, sentences: Sequence[Sequence[str]]) -> list[Pieces]:
        """Return the pieces of each sentence. Raises ConfigError for a word that has no ids.

        A word that the tokenizer drops, such as a control character, has no piece.
        """
        words = [self._before + word for words in sentences for word in words]
        ids = iter(self.tokenizer.encode_pieces(words))
        return [self._joined(list(itertools.islice(ids, len(words)))) for words in sentences]

    def _joined(self, pieces: list[np.ndarray]) -> Pieces:
        cls, sep = self.tokenizer.specials.cls, self.tokenizer.specials.sep
        sizes = np.array([len(each) for each in pieces], np.int64)
        starts = np.cumsum(sizes) - sizes
        words = np.flatnonzero((sizes > 0) & (starts < self.most_words))
        words = words[words < self.most_words]
        self.num_cut += int(sizes.sum()) > self.most_words or len(pieces) > self.most_words
        whole = np.concatenate([*pieces, np.empty(0, np.int64)]).astype(np.int64)
        ids = np.concatenate([[cls], whole[: self.most_words], [sep]])
        return Pieces(ids, starts[words] + 1, words)


class EncodedWords:
    """Encoded sentences, and the label of each of their words."""

    def __init__(self, pieces: Sequence[Pieces], labels: Sequence[IntArray]) -> None:
        """Take sentences and labels [words] of each."""
        self.pieces, self.labels = pieces, labels
        self.lengths = np.array([len(each.ids) for each in pieces], np.int64)  # [N]
        self.counts = np.array([len(each.words) for each in pieces], np.int64)  # [N] with a piece

    def __len__(self) -> int:
        return len(self.pieces)

    def batch(
        self, numbers: IntArray, most: int, where: Where, divisors: Mapping[str, float]
    ) -> Batch:
        """Return the sentences [B], as long as the longest of them, at most `most`."""
        lengths, pieces = self.lengths[numbers], [self.pieces[i] for i in numbers]
        length = int(padded_length(int(lengths.max(initial=1)), most))
        firsts = [row * length + each.firsts for row, each in enumerate(pieces)]
        labels = [self.labels[i][self.pieces[i].words] for i in numbers]
        if not self.counts[numbers].sum():  # kernels take no empty arrays: a row that counts not
            firsts, labels = [np.array([-1])], [np.array([IGNORE_INDEX])]
        tokens = padded([each.ids for each in pieces], length, 0)
        arrays = {
            "tokens": tokens,
            "types": np.zeros_like(tokens),
            "firsts": np.concatenate(firsts),
            "labels": np.concatenate(labels),
        }
        upload = where.device.upload
        return Batch(
            {name: upload(array) for name, array in arrays.items()},
            divisors,
            Where(where.step, where.samples, np.arange(length), device=where.device),
            KeyLimits(lengths) if (lengths < length).any() else None,
        )

    def of_words(self, numbers: IntArray, found: IntArray, missing: int) -> list[IntArray]:
        """Return a label for each word of the sentences [B] from those `found` [M] in a batch.

        Words without a piece, and those that were cut, get `missing`.
        """
        out, ends = [], np.cumsum(self.counts[numbers])
        for number, end in zip(numbers, ends, strict=True):
            words = self.pieces[number].words
            row = np.full(len(self.labels[number]), missing, np.int64)
            row[words] = found[end - len(words) : end]
            out.append(row)
        return out
