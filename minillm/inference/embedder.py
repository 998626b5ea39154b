"""Embeddings of texts by an encoder, over tensor-parallel ranks and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, sum_dtype, to_host
from minillm.base.errors import ConfigError
from minillm.comm.agreement import agree
from minillm.data.buckets import padded, padded_length
from minillm.data.tokenizers import encoder_tokenizer
from minillm.inference.forward import gather_rows_, last_outputs, own_batches
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.training.assembly import Assembly


class Embedder:
    """Ranks that embed texts together, each replica its share of the batches.

    The embedding of a text is the mean of the last hidden states of its tokens ("mean"), or that of
    the first token ("cls"), scaled to length 1 (Reimers and Gurevych 2019, arXiv:1908.10084).
    """

    def __init__(
        self, model: Assembly, vocabulary: Mapping[str, Any], pooling: str | None = None
    ) -> None:
        """Raise ConfigError for another pooling, and for a vocabulary without marks of texts.

        A `pooling` of None is that of the vocabulary, else the mean.
        """
        pooling = pooling or vocabulary.get("pooling") or "mean"
        if pooling not in ("mean", "cls"):
            raise ConfigError(f"pooling {pooling!r} is not known; it can be mean or cls")
        shape: Any = next(iter(model.stages.values())).model
        self.model, self.pooling = model, pooling
        self.context, self.dim = shape.config.context, shape.config.dim
        self.tokenizer = encoder_tokenizer(vocabulary, shape.config.vocab)

    def texts(self, texts: Sequence[str], batch: int) -> tuple[np.ndarray, int]:
        """Return the embeddings float32 [N, D] of `texts`, and how many were cut to the context.

        Texts of similar length are computed together, `batch` at once on each replica. Collective
        over all ranks, of which each returns the same. Raises ConfigError on every rank for a text
        that has no ids.
        """
        replicas, world = self.model.mesh.axis("dp"), self.model.mesh.world
        own = own_batches([len(text) for text in texts], batch, self.model)
        ids = agree(world, lambda: [[self._ids(texts[i]) for i in part] for part in own])
        found = self.embed([[self._cut(each) for each in part] for part in ids])
        rows = np.zeros((len(texts), self.dim), np.float32)
        gather_rows_(rows, own, found, self.model, world)
        longer = sum(len(each) > self.context for part in ids for each in part)
        return rows, int(replicas.reduce_numbers([longer])[0])

    def _ids(self, text: str) -> IntArray:
        """Return the ids of a text between its marks."""
        marks = self.tokenizer.specials
        try:
            ids = self.tokenizer.encode(text)
        except ConfigError as error:
            raise ConfigError(f"{text[:40]!r}: {error}") from None
        return np.concatenate([[marks.cls], ids, [marks.sep]]).astype(np.int64)

    def _cut(self, ids: IntArray) -> IntArray:
        """Return ids that fit: the first ones and the last mark."""
        return ids if len(ids) <= self.context else np.append(ids[: self.context - 1], ids[-1])

    def embed(self, batches: Sequence[Sequence[IntArray]]) -> list[np.ndarray]:
        """Return the embeddings of each batch of ids, float [B, D]; [] before the last stage.

        Ids are int64 [length], special tokens included, at most `context` of them. Collective over
        the tp and pp axes.
        """
        return last_outputs(self.model, [self._batch(texts) for texts in batches], self._pooled)

    def _batch(self, texts: Sequence[IntArray]) -> Batch:
        lengths, device = np.array([len(ids) for ids in texts], np.int64), self.model.device
        size = int(padded_length(int(lengths.max()), self.context))
        tokens = padded(texts, size, 0)
        arrays = {"tokens": tokens, "types": np.zeros_like(tokens)}
        where = Where(0, np.arange(len(texts)), np.arange(size), device=device)
        uploaded = {name: device.upload(array) for name, array in arrays.items()}
        return Batch(uploaded, {}, where, KeyLimits(lengths))

    def _pooled(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        hidden, limits = to_host(outputs[0].data), batch.limits  # [B, T, D]
        assert limits is not None and limits.lengths is not None
        states = hidden.astype(sum_dtype(hidden.dtype), copy=False)
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            share = np.arange(hidden.shape[1]) < limits.lengths[:, None]
            weights = (share / limits.lengths[:, None]).astype(states.dtype)
            pooled = np.matmul(weights[:, None], states)[:, 0]
        norms = np.linalg.norm(pooled, axis=1, keepdims=True)
        return pooled / np.maximum(norms, 1e-12)
