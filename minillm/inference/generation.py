"""Sampling text from a trained model, token by token with a key-value cache, over tensor-parallel
ranks and pipeline stages.

The prompt goes through the model once and leaves keys and values in each layer's cache; every
further token costs one position. Stages pass hidden states on as in training; the last one samples,
and its choice is broadcast to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from minillm.autograd.tape import Tensor, no_grad
from minillm.base import rng
from minillm.base.arrays import Array, sum_dtype, to_host
from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.comm.mesh import Mesh
from minillm.models.gpt import GPT
from minillm.nn.attention import Attention, KVCache
from minillm.parallel.tensor import TensorParallel
from minillm.params.module import Module
from minillm.params.where import Where
from minillm.training.assembly import Assembly

_TAG = 90


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits: temperature 0 takes the most likely; top_k keeps the k
    most likely; top_p the smallest set of that total probability (Holtzman et al. 2020,
    arXiv:1904.09751)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"--temperature {self.temperature} and --top-k {self.top_k} must be at least 0, "
                f"--top-p {self.top_p} above 0 and at most 1"
            )

    def choose(self, logits: np.ndarray, position: int) -> np.ndarray:
        """One token id per row of logits [B, V]; the random number is addressed by (seed, position,
        row)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits)
        key = rng.key(self.seed, "sample", "token", position)
        uniform = rng.uniform(key, (len(logits),), (slice(0, len(logits)),), np.dtype(np.float64))
        cumulative = probabilities.cumsum(-1)
        return np.minimum(
            (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1), logits.shape[-1] - 1
        )

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution [B, V] that `choose` samples from, in float64."""
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, axis=-1, kind="stable")
        ranked = np.take_along_axis(scaled, order, -1)
        p = np.exp(ranked - ranked[:, :1])
        if self.top_k:
            p[:, self.top_k :] = 0
        p /= p.sum(-1, keepdims=True)
        p[(p.cumsum(-1) - p) >= self.top_p] = 0
        p /= p.sum(-1, keepdims=True)
        out = np.empty_like(p)
        np.put_along_axis(out, order, p, -1)
        return out


class Generator:
    """The ranks of one dp coordinate generating together; collective over their tp and pp axes."""

    def __init__(self, model: Assembly) -> None:
        self.mesh, self.device = model.mesh, model.device
        self.stage = next(iter(model.stages.values()))
        self.model = inference_model(self.stage.model, self.mesh)

    def generate(self, prompt: Sequence[int], num_tokens: int, sampling: Sampling) -> list[int]:
        """`num_tokens` ids that continue `prompt` (at least one id). Past the model's context, the
        last half of it is read anew."""
        context = self.model.config.context
        ids = list(prompt)
        with no_grad():
            while len(ids) < len(prompt) + num_tokens:
                window = ids[-context:] if len(ids) <= context else ids[-(context // 2 or 1) :]
                ids += self._fill(
                    window,
                    min(context - len(window) + 1, len(prompt) + num_tokens - len(ids)),
                    sampling,
                    len(ids),
                )
        return ids[len(prompt) :]

    def _fill(self, window: list[int], count: int, sampling: Sampling, position: int) -> list[int]:
        """`count` tokens after `window`, with one cache."""
        chosen: list[int] = []
        with caches(
            self.model, 1, self.model.config.context, self.stage.buffers.values.dtype, self.device
        ):
            new, start = window, 0
            for i in range(count):
                logits = self.logits(np.array([new]), np.arange(start, start + len(new)))
                start += len(new)
                chosen.append(self._agree(logits, sampling, position + i))
                new = chosen[-1:]
        return chosen

    def logits(self, ids: np.ndarray, times: np.ndarray) -> np.ndarray | None:
        """Logits [B, V] of the last position of ids [B, T] at positions `times`, on ranks of the
        last stage; None on others."""
        links, index = self.mesh.axis("pp"), self.mesh.coord("pp")
        where = Where(0, np.arange(len(ids)), times, device=self.device)
        source: Array | Tensor = self.device.upload(ids)
        if self.model.embedding is None:
            arrived = self.device.xp.empty(
                (*ids.shape, self.model.config.dim), self.stage.buffers.values.dtype
            )
            source = Tensor(links.recv(arrived, index - 1, _TAG))
        hidden = self.model(source, where)
        if self.model.head is None:
            links.send(hidden.data, index + 1, _TAG)
            return None
        last = to_host(self.model.logits(Tensor(hidden.data[:, -1:]))[:, 0])
        return last.astype(sum_dtype(last.dtype), copy=False)

    def _agree(self, logits: np.ndarray | None, sampling: Sampling, position: int) -> int:
        token = np.zeros(1, np.int64)
        if logits is not None:
            token[:] = sampling.choose(logits, position)
        links = self.mesh.axis("pp")
        links.broadcast_(token, links.size - 1, kind="control")
        return int(token[0])


def inference_model(model: GPT, mesh: Mesh) -> GPT:
    """The same model, sharing the parameters' memory, with activations outside the parallel parts
    replicated: single positions cannot be sharded along time."""
    twin = GPT(
        model.config,
        TensorParallel(mesh.axis("tp")),
        seed=model.seed,
        layers=model.blocks.keys(),
        first=model.embedding is not None,
        last=model.head is not None,
    )
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        ours.storage = theirs.storage
    twin.train(False)
    return twin


@contextmanager
def caches(
    model: GPT, batch: int, capacity: int, dtype: np.dtype, device: Device = CPU
) -> Iterator[None]:
    """Give every attention layer an empty key-value cache inside the block."""
    layers = list(_attentions(model))
    for layer in layers:
        layer.cache = KVCache(batch, capacity, layer.kv_heads, layer.head_width, dtype, device)
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None


def _attentions(module: Module) -> Iterator[Attention]:
    for _, child in module.children():
        if isinstance(child, Attention):
            yield child
        elif isinstance(child, Module):
            yield from _attentions(child)
