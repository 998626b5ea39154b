"""Key-value cache: keys and values of the positions that a model has read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.models.protocol import Decoder
from minillm.nn.attention import Attention, CrossAttention, Heads, MemoryKeys
from minillm.nn.recurrent import Recurrence
from minillm.ops.attention import split_heads
from minillm.params.where import KeyLimits, Pass


class KVCache:
    """Attention core that attends over cached keys and values, for inference alone.

    keys, values: [B, capacity, Hkv_local, K]. A position is stored at the index of its time.
    Samples may differ in length: causality hides what a sample has not reached.
    """

    def __init__(
        self, batch: int, capacity: int, heads: Heads, dtype: np.dtype, device: Device
    ) -> None:
        # Zeros, because hidden values get weight 0, and 0 times an uninitialised NaN is NaN.
        self.keys = device.xp.zeros((batch, capacity, heads.kv, heads.width), dtype)
        self.values = device.xp.zeros_like(self.keys)

    def __call__(
        self,
        qkv: Tensor,
        heads: Heads,
        visibility: kernels.Visibility,
        dropout: kernels.AttentionDropout | None,
        pass_: Pass,
    ) -> Tensor:
        """Store the keys of qkv [B, T, (H + 2 Hkv) K] and attend to all so far: [B, T, H K].

        `pass_.whole.times` are consecutive positions [T], or any positions [B, T].
        """
        times, times_k = pass_.whole.times, visibility.times_k
        assert times is not None and times_k is not None
        q, k, v = split_heads(qkv.data, heads.queries, heads.kv)
        if times.ndim == 1:
            at: tuple[Any, Any] = (slice(None), slice(int(times[0]), int(times[-1]) + 1))
        else:
            at = (np.arange(len(times))[:, None], times)
        self.keys[at], self.values[at] = k, v
        seen = slice(len(times_k))
        o, _ = kernels.attention_forward(
            q,
            self.keys[:, seen],
            self.values[:, seen],
            scale=heads.width**-0.5,
            visibility=visibility,
        )
        return Tensor(o.reshape(*qkv.shape[:2], -1))

    def reorder(self, parents: IntArray) -> None:
        """Let row r continue row parents[r], int64 [B']."""
        self.keys, self.values = self.keys[parents], self.values[parents]


def cached_keys(times: np.ndarray) -> KeyLimits:
    """Return the keys of a pass over positions `times` int64 [T] or [B, T]: all up to the last."""
    return KeyLimits(times_q=times, times_k=np.arange(int(times.max()) + 1))


def new_cache(models: Iterable[Decoder], batch: int, device: Device) -> dict[str, Any]:
    """Return an empty cache for each layer of this rank's stages that has one, by its name.

    Attention layers keep keys and values of `batch` sequences of at most `model.context` positions,
    in the dtype of the parameters. Layers that read a memory keep its keys and values, recurrent
    layers their state.
    """
    found: dict[str, Any] = {}
    for model in models:
        dtype = model.parameters()[0].dtype
        for layer in model.modules(Attention):
            if layer.causal:
                found[layer.name] = KVCache(batch, model.context, layer.heads, dtype, device)
        found |= {layer.name: MemoryKeys() for layer in model.modules(CrossAttention)}
        found |= {
            layer.name: layer.states(batch, dtype, device) for layer in model.modules(Recurrence)
        }
    return found
