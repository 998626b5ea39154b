"""Tags that a trained tagger gives to the words of sentences, and the entities that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.record import Record
from minillm.data.conll import TagFields, Untagged, read_untagged
from minillm.data.documents import SpecialTokenizer
from minillm.data.tags import OUTSIDE, is_tag, spans_of
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_words import EncodedWords, WordEncoder


@dataclass(frozen=True, kw_only=True)
class WordsToTag(Record):
    """Columns of the input, where it has some."""

    token_field: str | None = None
    """Column of the words, by number, or field of JSON lines; left out: as in training."""


class TagPredictor:
    """Tags of the words of sentences. Implements `Predictor`."""

    noun = "sentence"

    def __init__(
        self, tokenizer: SpecialTokenizer, labels: Sequence[str], fields: TagFields, context: int
    ) -> None:
        """Raise ConfigError for labels that are no tags of entities."""
        if OUTSIDE not in labels or not all(map(is_tag, labels)):
            raise ConfigError(
                f"these weights have the labels {', '.join(labels[:8])}, but a tagger has O and "
                "tags of entities, such as B-person and I-person; name them in id2label of "
                "its config.json, or train it with minillm finetune --task tag"
            )
        self.encoder, self.labels, self.fields = WordEncoder(tokenizer, context), labels, fields
        self.width = self.encoder.most_words

    @property
    def num_cut(self) -> int:
        """Sentences that were cut so far."""
        return self.encoder.num_cut

    def read(self, path: str) -> list[Untagged]:
        """Read the sentences of a file. Raises ConfigError."""
        return read_untagged(path, self.fields)

    def size(self, sentence: Sequence[Any]) -> int:
        """Return the characters of the words of a sentence."""
        return sum(map(len, Untagged(*sentence).tokens))

    def encode(self, inputs: Sequence[Sequence[Any]]) -> WordsInRows:
        """Return a row of ids for each sentence. Raises ConfigError for a word without ids."""
        tokens = [Untagged(*each).tokens for each in inputs]
        none = [np.zeros(len(each), np.int64) for each in tokens]
        words = EncodedWords(self.encoder.encode(tokens), none)
        return WordsInRows(words, self.encoder.context, self.labels.index(OUTSIDE))

    def values(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the label of each position where a word begins, [B, context] float64, else 0."""
        firsts = to_host(batch.arrays["firsts"])
        found = np.zeros(batch.arrays["tokens"].shape)
        found.reshape(-1)[firsts[firsts >= 0]] = to_host(outputs[-1].data).argmax(1)[firsts >= 0]
        return np.pad(found, ((0, 0), (0, self.encoder.context - found.shape[1])))

    def line(self, sentence: Sequence[Any], values: np.ndarray) -> Mapping[str, Any]:
        """Return the tags, and the entities with their words, from labels [width] of the words."""
        text, tokens, starts = Untagged(*sentence)
        known = [self.labels[int(number)] for number in values[: len(tokens)]]
        tags = known + [OUTSIDE] * (len(tokens) - len(known))
        spans = []
        for type_, start, end in spans_of(tags):
            if text is not None:
                start, end = starts[start], starts[end - 1] + len(tokens[end - 1])
            words = " ".join(tokens[start:end]) if text is None else text[start:end]
            spans.append({"type": type_, "start": start, "end": end, "text": words})
        found = {} if text is None else {"text": text}
        return {**found, "tokens": list(tokens), "tags": tags, "spans": spans}


class WordsInRows:
    """Encoded sentences, one in each row. Implements `InputRows`."""

    def __init__(self, words: EncodedWords, context: int, missing: int) -> None:
        """Take encoded sentences, and the label of words that have no piece."""
        self.words, self.context, self.missing = words, context, missing
        self.sizes = words.lengths

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the sentences `rows` [B]."""
        return self.words.batch(rows, self.context, Where(0, rows, device=device), {})

    def merged(self, values: np.ndarray) -> np.ndarray:
        """Return the label of each word [N, context - 2] from those of positions [N, context]."""
        out = np.full((len(values), self.context - 2), float(self.missing))
        for row, found, pieces in zip(out, values, self.words.pieces, strict=True):
            row[pieces.words] = found[pieces.firsts]
        return out
