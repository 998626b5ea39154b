"""Self-attention over heads cut between the tensor-parallel ranks."""

from __future__ import annotations

import numpy as np

from minillm import kernels, ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array, sum_dtype
from minillm.base.device import CPU, Device
from minillm.layout.sharding import Segment
from minillm.nn.dropout import Dropout
from minillm.ops.attention import split_heads
from minillm.parallel.tensor import ColumnParallelLinear, Region, RowParallelLinear
from minillm.params.module import Module, Where

ROTARY_BASE = 10000.0


class KVCache:
    """Keys and values of the positions seen so far, for generation: [B, capacity, Hkv_local, K]
    each, the first `length` valid."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_width: int,
        dtype: np.dtype,
        device: Device = CPU,
    ) -> None:
        self.keys = device.xp.empty((batch, capacity, kv_heads, head_width), dtype)
        self.values = device.xp.empty_like(self.keys)
        self.length = 0

    def append(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Store k, v [B, T_new, Hkv_local, K] and return views of everything so far."""
        end = self.length + k.shape[1]
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class Attention(Module):
    """Multi-head attention (Vaswani et al. 2017), grouped-query when kv_heads < heads (Ainslie et
    al. 2023, arXiv:2305.13245), rotary positions on demand.

    The fused projection is laid out [q heads | k heads | v heads]; each rank holds heads/tp query
    heads and kv_heads/tp key-value heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        region: Region,
        *,
        rotary: bool,
        bias: bool,
        std: float,
        out_std: float,
        dropout: Dropout,
        causal: bool = True,
    ) -> None:
        width = dim // heads
        queries, groups = (
            Segment(heads * width, ("tp",), width),
            Segment(kv_heads * width, ("tp",), width),
        )
        self.heads, self.kv_heads = heads // region.comm.size, kv_heads // region.comm.size
        self.first_head = region.comm.rank * self.heads
        self.head_width = width
        self.rotary = rotary
        self.visibility = kernels.Visibility(causal)
        self.cache: KVCache | None = None
        self.qkv = ColumnParallelLinear(dim, (queries, groups, groups), region, bias=bias, std=std)
        self.out = RowParallelLinear(queries, dim, region, bias=bias, std=out_std)
        self.dropout = dropout

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T, D] -> [B, T, D], both outside the region."""
        whole = where.gathered or where
        qkv = self.qkv(x, where)  # [B, T, (H + 2 Hkv) K] of the whole sequence
        if self.rotary:
            cos, sin = self._rotary_tables(whole, sum_dtype(qkv.dtype))
            qkv = ops.rotary(qkv, heads=self.heads, kv_heads=self.kv_heads, cos=cos, sin=sin)
        if self.cache is not None:
            return self.out(self._attend_cached(qkv, whole, self.cache), where)
        y = ops.attention(
            qkv,
            heads=self.heads,
            kv_heads=self.kv_heads,
            visibility=self.visibility,
            dropout=self._dropout(whole),
        )
        return self.out(y, where)

    def _rotary_tables(self, where: Where, dtype: np.dtype) -> Array:
        """cos and sin [2, T, K/2] of the positions."""
        return where.table(
            ("rotary", self.head_width, str(dtype)),
            lambda: np.stack(kernels.rope_tables(where.times, self.head_width, ROTARY_BASE, dtype)),
        )

    def _dropout(self, where: Where) -> kernels.AttentionDropout | None:
        if not self.dropout.p or not self.dropout.training:
            return None
        samples, times = where.addresses()
        return kernels.AttentionDropout(
            self.dropout.p, self.dropout.key(where), samples, self.first_head, times, times
        )

    def _attend_cached(self, qkv: Tensor, where: Where, cache: KVCache) -> Tensor:
        """Attention of the new positions over all positions so far; for inference only."""
        B, T, _ = qkv.shape
        H, G, K = self.heads, self.kv_heads, self.head_width
        q, k, v = split_heads(qkv.data, H, G)
        k, v = cache.append(k, v)
        o, _ = kernels.attention_forward(
            q,
            k,
            v,
            scale=K**-0.5,
            visibility=kernels.Visibility(self.visibility.causal, where.times),
        )
        return Tensor(o.reshape(B, T, H * K))
