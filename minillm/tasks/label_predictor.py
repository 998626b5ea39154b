"""Predictions of a trained classifier for texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.device import Device
from minillm.base.record import Record
from minillm.data.documents import SpecialTokenizer
from minillm.data.labelled import Fields, InputFields, read_inputs
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_texts import EncodedTexts, Encoder
from minillm.tasks.targets import Targets


@dataclass(frozen=True, kw_only=True)
class TextsToLabel(Record):
    """Columns of the input, where it is a table."""

    text_field: str | None = None
    """Column of the text; left out: as in training."""
    pair_field: str | None = None
    """Column of the second text of a pair; left out: as in training."""
    pairs: bool = False
    """Read pairs of texts, which weights of another library do not ask for by themselves."""


class TextPredictor:
    """Part of a predictor of texts and pairs: the inputs of a file."""

    noun = "text"

    def __init__(self, tokenizer: SpecialTokenizer, fields: InputFields, context: int) -> None:
        self.encoder, self.fields = Encoder(tokenizer, context), fields

    @property
    def num_cut(self) -> int:
        """Texts that were cut so far."""
        return self.encoder.num_cut

    def read(self, path: str) -> list[tuple[str, ...]]:
        """Read the texts of a file. Raises ConfigError."""
        return read_inputs(path, self.fields)

    def size(self, texts: Sequence[str]) -> int:
        """Return the characters of a text or pair."""
        return sum(map(len, texts))


class LabelPredictor(TextPredictor):
    """Labels or numbers for texts and pairs. Implements `Predictor`."""

    def __init__(
        self,
        tokenizer: SpecialTokenizer,
        labels: Sequence[str],
        targets: Targets,
        fields: Fields,
        context: int,
    ) -> None:
        super().__init__(tokenizer, fields, context)
        self.labels, self.targets, self.width = labels, targets, len(labels)

    def encode(self, inputs: Sequence[Sequence[str]]) -> TextsInRows:
        """Return a row of ids for each text or pair. Raises ConfigError for one without ids."""
        ids = self.encoder.encode([tuple(texts) for texts in inputs])
        return TextsInRows(EncodedTexts(ids, [0] * len(ids)), self.encoder.context)

    def values(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the predictions from a classifier's logits, float64 [B, labels]."""
        return self.targets.predicted(to_host(outputs[-1].data).astype(np.float64))

    def line(self, texts: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
        """Return the text and its prediction from the numbers [labels]."""
        found = {"text": texts[0]} if len(texts) == 1 else {"texts": list(texts)}
        return {**found, **self.targets.line(self.labels, values)}


class TextsInRows:
    """Encoded texts, one in each row. Implements `InputRows`."""

    def __init__(self, texts: EncodedTexts, context: int) -> None:
        self.texts, self.context, self.sizes = texts, context, texts.lengths

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the texts `rows` [B]."""
        return self.texts.batch(rows, self.context, Where(0, rows, device=device), {})

    def merged(self, values: np.ndarray) -> np.ndarray:
        """Return `values` [N, width]: each text has one row."""
        return values
