"""Cache of the positions that a model has read: keys and values, memories, recurrent states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Tensor
from minillm.base.arrays import namespace, placed
from minillm.base.device import Device
from minillm.models.protocol import Decoder
from minillm.nn.attention import Attention, CrossAttention, Heads, MemoryKeys
from minillm.nn.recurrent import Recurrence
from minillm.ops.attention import split_heads
from minillm.params.where import KeyLimits, Pass

LEAST = 64  # positions that a cache has room for at first


class KVCache:
    """Attention core that attends over cached keys and values, for inference alone.

    keys, values: [B, capacity, Hkv_local, K]. A position is stored at the index of its time. Rows
    may differ in length: causality hides what a row has not reached. `reserve` makes room.
    """

    def __init__(self, keys: Any, values: Any, context: int) -> None:
        self.keys, self.values, self.context = keys, values, context

    @classmethod
    def empty(
        cls, batch: int, context: int, heads: Heads, dtype: np.dtype, device: Device
    ) -> KVCache:
        """Return a cache of `batch` rows for at most `context` positions."""
        shape = (batch, min(LEAST, context), heads.kv, heads.width)
        # Zeros, because hidden values get weight 0, and 0 times an uninitialised NaN is NaN.
        return cls(device.xp.zeros(shape, dtype), device.xp.zeros(shape, dtype), context)

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
            xp = namespace(self.keys)
            at = (xp.arange(len(times))[:, None], placed(self.keys, times))
        self.keys[at], self.values[at] = k, v
        seen = slice(len(times_k))
        o, _ = kernels.attention_forward(
            q,
            self.keys[:, seen],
            self.values[:, seen],
            scale=heads.scale,
            visibility=visibility,
            cap=heads.cap,
        )
        return Tensor(o.reshape(*qkv.shape[:2], -1))

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; it doubles, so that a text is copied few times."""
        held = self.keys.shape[1]
        if length > held:
            more = min(max(length, 2 * held), self.context) - held
            self.keys, self.values = (_longer(each, more) for each in (self.keys, self.values))

    def rows(self, index: Any) -> KVCache:
        """Return the cache of some rows: views for a slice, copies for int64 [B']."""
        at = placed(self.keys, index)
        return KVCache(self.keys[at], self.values[at], self.context)

    def put(self, index: Any, part: KVCache) -> None:
        """Overwrite rows by those of `part`."""
        length, at = part.keys.shape[1], placed(self.keys, index)
        self.reserve(length)
        self.keys[at, :length], self.values[at, :length] = part.keys, part.values


def _longer(array: Any, more: int) -> Any:
    shape = (len(array), array.shape[1] + more, *array.shape[2:])
    longer = namespace(array).zeros(shape, array.dtype)
    longer[:, : array.shape[1]] = array
    return longer


class Cache(dict[str, Any]):
    """Memory of some rows in each layer that has one, by its name.

    Attention layers have a `KVCache`, layers that read a memory its `MemoryKeys`, and recurrent
    layers an array of states [S, B, H_local].
    """

    def reserve(self, length: int) -> None:
        """Make room for `length` positions."""
        for held in self.values():
            if isinstance(held, KVCache):
                held.reserve(length)

    def rows(self, index: Any) -> Cache:
        """Return the cache of some rows: views for a slice, copies for int64 [B']."""
        return Cache(
            {
                name: held.rows(index) if hasattr(held, "rows") else held[:, placed(held, index)]
                for name, held in self.items()
            }
        )

    def put(self, index: Any, part: Cache) -> None:
        """Overwrite rows by those of `part`. A memory stays as it is: nothing changes it."""
        for name, held in self.items():
            if isinstance(held, KVCache):
                held.put(index, part[name])
            elif not isinstance(held, MemoryKeys):
                held[:, placed(held, index)] = part[name]

    @property
    def rewinds(self) -> bool:
        """True if a row can go on from an earlier position: later keys are hidden by causality."""
        return all(isinstance(held, KVCache) for held in self.values())


def cached_keys(times: np.ndarray) -> KeyLimits:
    """Return the keys of a pass over positions `times` int64 [T] or [B, T]: all up to the last."""
    return KeyLimits(times_q=times, times_k=np.arange(int(times.max()) + 1))


def new_cache(models: Iterable[Decoder], batch: int, device: Device) -> Cache:
    """Return an empty cache of `batch` rows, in the dtype of the parameters."""
    found = Cache()
    for model in models:
        dtype = model.parameters()[0].dtype
        for layer in model.modules(Attention):
            if layer.causal:
                found[layer.name] = KVCache.empty(batch, model.context, layer.heads, dtype, device)
        found |= {layer.name: MemoryKeys() for layer in model.modules(CrossAttention)}
        found |= {
            layer.name: layer.states(batch, dtype, device) for layer in model.modules(Recurrence)
        }
    return found
