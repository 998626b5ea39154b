"""Passes of a trained model over batches with caches, over tensor-parallel ranks and stages.

The stages run the forward-only schedule, as in evaluation. A batch in several parts keeps several
stages busy at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, sum_dtype, to_host
from minillm.base.errors import CheckpointError
from minillm.inference.cache import Cache, cached_keys, new_cache
from minillm.inference.scores import Scores
from minillm.models.protocol import Batch, Decoder
from minillm.params.where import Where
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.training.assembly import Assembly

UNLIMITED = 1 << 60  # tokens


class Generator:
    """Ranks of one dp coordinate that generate together. Collective over their tp and pp axes.

    Only ids below `num_ids` are chosen: those of the tokenizer, where the vocabulary of the model
    is padded. None: all. `inputs` names the array of a batch that holds the ids.
    """

    inputs = "tokens"

    def __init__(self, model: Assembly, num_ids: int | None = None) -> None:
        self.num_ids = num_ids
        self.device = model.device
        self.links, self._tp = model.mesh.axis("pp"), model.mesh.axis("tp")
        self.models = {i: cast(Decoder, stage.model) for i, stage in model.stages.items()}
        self._placement = model.layout.rank_of_stage
        self._last_stage, self._last_rank = len(self._placement) - 1, self._placement[-1]
        self._sharded = model.replication.sharded
        self._num_parts, self._first_id, self._whole = 1, -1, True
        self._found: list[np.ndarray] = []  # logits of the parts of a batch, on the last stage
        self._runtime = PipelineRuntime(
            self._schedule(), model.stages, self.links, model.replication, count=self._keep
        )

    @property
    def context(self) -> int:
        """Most positions that the model can read."""
        return next(iter(self.models.values())).context

    @property
    def most_parts(self) -> int:
        """Parts of a batch that keep every stage busy."""
        return self.links.size

    def reads(self, length: int) -> int:
        """Return how many of the last ids of a text of `length` ids the model reads."""
        return length if length <= self.context else self.context // 2 or 1

    def room(self, length: int, window: bool) -> int:
        """Return how many ids can follow a text of `length` ids, in a `window` any number."""
        return UNLIMITED if window else self.context - self.reads(length) + 1

    def new_cache(self, batch: int) -> Cache:
        """Return an empty cache for `batch` sequences in this rank's layers."""
        return new_cache(self.models.values(), batch, self.device)

    def batch(self, ids: IntArray, times: IntArray, cache: Cache | None = None) -> Batch:
        """Return the batch of ids int64 [B, T] at positions `times` int64 [T] or [B, T].

        `cache` holds earlier positions and receives these; without one, `ids` are whole sequences.
        """
        where = Where(0, np.arange(len(ids)), times, device=self.device)
        arrays = {self.inputs: self.device.upload(ids)}
        if cache is None:
            return Batch(arrays, {}, where, None, {})
        cache.reserve(int(times.max()) + 1)
        return Batch(arrays, {}, where, cached_keys(times), cache)

    def logits(
        self, ids: IntArray, times: IntArray, cache: Cache | None = None
    ) -> np.ndarray | None:
        """Return the logits [B, V] of the last position of a `batch`, whole on each tp rank.

        They are None before the last stage.
        """
        return self._run([self.batch(ids, times, cache)], whole=True)

    def scores(self, batches: Sequence[Batch]) -> Scores | None:
        """Return the scores of the tokens after the last positions of `batches`, one after another.

        They are None before the last stage. Raises CheckpointError if one is not finite.
        """
        logits = self._run(batches, whole=False)
        if logits is None:
            return None
        if not np.isfinite(logits).all():
            raise CheckpointError(
                f"the logits of position {int(batches[-1].where.times.max())} are not finite, "  # type: ignore[union-attr]
                "although the weights are; use an earlier checkpoint"
            )
        if self._first_id < 0:
            widths = self._tp.all_gather(np.array([logits.shape[1]], np.int64), kind="control")
            self._first_id = int(widths[: self._tp.rank].sum())
        if self.num_ids is not None:
            logits = logits[:, : max(0, self.num_ids - self._first_id)]
        ids = np.arange(self._first_id, self._first_id + logits.shape[1])
        return Scores(logits.astype(np.float64), np.broadcast_to(ids, logits.shape), self._tp)

    def agree(self, choice: np.ndarray) -> np.ndarray:
        """Overwrite `choice`, of the same shape on every rank, by that of the last stage."""
        return self.links.broadcast_(choice, self._last_rank, kind="control")

    def _run(self, batches: Sequence[Batch], whole: bool) -> np.ndarray | None:
        if len(batches) != self._num_parts:
            self._num_parts = len(batches)
            self._runtime.use(self._schedule())
        self._whole = whole
        self._found.clear()
        self._runtime.run(batches)
        return np.concatenate(self._found) if self._found else None

    def _schedule(self) -> Any:
        schedule = forward_only(self._placement, self._num_parts)
        return lower(schedule, train=False, sharded=self._sharded)

    def _keep(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Keep the logits of the last positions of a part, which the last stage has computed."""
        last = (Tensor(outputs[0].data[:, -1:]),)
        model = self.models[self._last_stage]
        logits = to_host(model.logits(last, batch, whole=self._whole)[:, 0])
        self._found.append(logits.astype(sum_dtype(logits.dtype), copy=False))
        return {}
