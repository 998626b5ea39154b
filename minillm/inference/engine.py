"""Autoregressive generation with a key-value cache, over tensor-parallel ranks and stages.

The prompt goes through the model once and leaves keys and values in each layer's cache. Every
further token costs one position. The stages run the forward-only schedule, as in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import sum_dtype, to_host
from minillm.base.errors import CheckpointError
from minillm.inference.cache import cached_keys, new_cache
from minillm.inference.sampling import Sampling
from minillm.models.protocol import Batch, Decoder
from minillm.params.where import Where
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.training.assembly import Assembly


class Generator:
    """Ranks of one dp coordinate that generate together. Collective over their tp and pp axes.

    Only ids below `num_ids` are chosen: those of the tokenizer, where the vocabulary of the model
    is padded. None: all.
    """

    def __init__(self, model: Assembly, num_ids: int | None = None) -> None:
        self.num_ids = num_ids
        self.device, self.links = model.device, model.mesh.axis("pp")
        self.models = {i: cast(Decoder, stage.model) for i, stage in model.stages.items()}
        placement = model.layout.rank_of_stage
        self._last_stage, self._last_rank = len(placement) - 1, placement[-1]
        self._runtime = PipelineRuntime(
            lower(forward_only(placement, 1), train=False, sharded=model.replication.sharded),
            model.stages,
            self.links,
            model.replication,
            count=self._keep,
        )

    @property
    def context(self) -> int:
        """Most positions that the model can read."""
        return next(iter(self.models.values())).context

    def generate(self, prompt: Sequence[int], num_tokens: int, sampling: Sampling) -> list[int]:
        """Return the ids that `stream` yields."""
        return list(self.stream(prompt, num_tokens, sampling))

    def stream(self, prompt: Sequence[int], num_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yield `num_tokens` ids that continue `prompt`, which has at least one id.

        When the context is full, generation restarts from its last half. Collective: every rank
        takes the same number of ids.
        """
        ids, end = list(prompt), len(prompt) + num_tokens
        while len(ids) < end:
            window = ids[-self.reads(len(ids)) :]
            count = min(self.context - len(window) + 1, end - len(ids))
            for token in self._fill(window, count, sampling, len(ids)):
                ids.append(token)
                yield token

    def reads(self, length: int) -> int:
        """Return how many of the last ids of a text of `length` ids the model reads."""
        return length if length <= self.context else self.context // 2 or 1

    def _fill(
        self, window: list[int], count: int, sampling: Sampling, position: int
    ) -> Iterator[int]:
        """Yield `count` tokens after `window`, from one cache."""
        cache = self.new_cache(1)
        new, start = window, 0
        for i in range(count):
            logits = self.logits(np.array([new]), np.arange(start, start + len(new)), cache)
            start += len(new)
            new = [self._agree(logits, sampling, position + i)]
            yield new[0]

    def new_cache(self, batch: int) -> dict[str, Any]:
        """Return an empty cache for `batch` sequences in this rank's layers."""
        return new_cache(self.models.values(), batch, self.device)

    def logits(
        self, ids: np.ndarray, times: np.ndarray, cache: Mapping[str, Any] | None = None
    ) -> np.ndarray | None:
        """Return the logits [B, V] of the last position of ids [B, T], None before the last stage.

        ids: int64 [B, T] at positions `times` int64 [T] or [B, T]. `cache` holds earlier positions
        and receives these; without one, `ids` are whole sequences.
        """
        where = Where(0, np.arange(len(ids)), times, device=self.device)
        limits = None if cache is None else cached_keys(times)
        arrays = {"tokens": self.device.upload(ids)}
        return self.run(Batch(arrays, {}, where, limits, {} if cache is None else cache))

    def run(self, batch: Batch) -> np.ndarray | None:
        """Return the logits [B, V] of the last position of `batch`, None before the last stage."""
        self._outputs: tuple[Tensor, ...] | None = None
        self._runtime.run([batch])
        if self._outputs is None:
            return None
        last = (Tensor(self._outputs[0].data[:, -1:]),)
        logits = to_host(self.models[self._last_stage].logits(last, batch)[:, 0])
        return logits.astype(sum_dtype(logits.dtype), copy=False)

    def _keep(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        self._outputs = outputs
        return {}

    def _agree(self, logits: np.ndarray | None, sampling: Sampling, position: int) -> int:
        """Choose a token on the last stage and broadcast it to the others."""
        token = np.zeros(1, np.int64)
        if logits is not None:
            if not np.isfinite(logits).all():
                raise CheckpointError(
                    f"the logits of token {position} are not finite, although the weights are; "
                    "use an earlier checkpoint"
                )
            token[:] = sampling.choose(logits[:, : self.num_ids], position)
        self.links.broadcast_(token, self._last_rank, kind="control")
        return int(token[0])
