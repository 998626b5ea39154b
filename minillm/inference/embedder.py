"""Embeddings of texts by an encoder, over tensor-parallel ranks and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, namespace, sum_dtype, to_host
from minillm.data.buckets import padded, padded_length
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.training.assembly import Assembly


class Embedder:
    """Ranks of one dp coordinate that embed together. Collective over their tp and pp axes.

    The embedding of a text is the mean of the last hidden states of its tokens ("mean"), or that of
    the first token ("cls"), scaled to length 1 (Reimers and Gurevych 2019, arXiv:1908.10084).
    """

    def __init__(self, model: Assembly, context: int, pooling: str = "mean") -> None:
        self.model, self.context, self.pooling = model, context, pooling

    def embed(self, batches: Sequence[Sequence[IntArray]]) -> list[np.ndarray]:
        """Return the embeddings of each batch of ids, float [B, D]; [] before the last stage.

        Ids are int64 [length], special tokens included, at most `context` of them.
        """
        model = self.model
        self._found: list[np.ndarray] = []
        if not batches:
            return []
        schedule = lower(
            forward_only(model.layout.rank_of_stage, len(batches)),
            train=False,
            sharded=model.replication.sharded,
        )
        runtime = PipelineRuntime(
            schedule, model.stages, model.mesh.axis("pp"), model.replication, count=self._keep
        )
        runtime.run([self._batch(texts) for texts in batches])
        return self._found

    def _batch(self, texts: Sequence[IntArray]) -> Batch:
        lengths, device = np.array([len(ids) for ids in texts], np.int64), self.model.device
        size = int(padded_length(int(lengths.max()), self.context))
        tokens = padded(texts, size, 0)
        arrays = {"tokens": tokens, "types": np.zeros_like(tokens)}
        where = Where(0, np.arange(len(texts)), np.arange(size), device=device)
        uploaded = {name: device.upload(array) for name, array in arrays.items()}
        return Batch(uploaded, {}, where, KeyLimits(lengths))

    def _keep(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        hidden, limits = outputs[0].data, batch.limits  # [B, T, D]
        assert limits is not None and limits.lengths is not None
        states = hidden.astype(sum_dtype(hidden.dtype), copy=False)
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            share = np.arange(hidden.shape[1]) < limits.lengths[:, None]
            weights = (share / limits.lengths[:, None]).astype(states.dtype)
            pooled = namespace(states).matmul(self.model.device.upload(weights)[:, None], states)
            pooled = pooled[:, 0]
        found = to_host(pooled)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        self._found.append(found / np.maximum(norms, 1e-12))
        return {}
