"""Vectors of texts by a trained embedder, or cosines of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import to_host
from minillm.data.documents import SpecialTokenizer
from minillm.data.related_texts import RelatedFields
from minillm.models.protocol import Batch
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.label_predictor import TextPredictor, TextsInRows


class EmbeddingPredictor(TextPredictor):
    """Vectors of `dim` numbers for texts, or a cosine for pairs. Implements `Predictor`."""

    def __init__(
        self, tokenizer: SpecialTokenizer, fields: RelatedFields, context: int, dim: int
    ) -> None:
        super().__init__(tokenizer, fields, context)
        self.width = 1 if fields.pairs else dim

    def encode(self, inputs: Sequence[Sequence[str]]) -> TextsToPool:
        """Return a row for each text of the inputs. Raises ConfigError for one without ids."""
        ids = self.encoder.encode([(text,) for texts in inputs for text in texts])
        texts = EncodedTexts(ids, np.zeros(len(ids), np.int64))
        return TextsToPool(texts, self.encoder.context, self.fields.pairs)

    def values(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the vector of each row, float64 [B, D]."""
        return to_host(outputs[-1].data).astype(np.float64)

    def line(self, texts: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
        """Return the text and its vector, or the pair and its cosine, as a JSON object."""
        if self.fields.pairs:
            return {"texts": list(texts), "cosine": round(float(values[0]), 6)}
        shortest = [float(str(value)) for value in values.astype(np.float32)]
        return {"text": texts[0], "embedding": shortest}


class TextsToPool(TextsInRows):
    """Encoded texts, one in each row. Implements `InputRows`."""

    def __init__(self, texts: EncodedTexts, context: int, pairs: bool) -> None:
        super().__init__(texts, context)
        self.pairs = pairs

    def merged(self, values: np.ndarray) -> np.ndarray:
        """Return the vectors [N, D], or the cosine of each two [N / 2, 1]."""
        return (values[::2] * values[1::2]).sum(1, keepdims=True) if self.pairs else values
