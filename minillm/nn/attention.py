"""Attention with heads cut over tp: to the own sequence by an exchangeable core, or to a memory."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from minillm import kernels, ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import placed, sum_dtype
from minillm.layout.sharding import Segment
from minillm.nn.dropout import Dropout
from minillm.nn.linear import ColumnParallelLinear, RowParallelLinear
from minillm.nn.norm import HeadNorm, WidthNorm
from minillm.nn.position import Rotary
from minillm.parallel.heads import complete, own_heads
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Parameter
from minillm.params.where import Pass


class Heads(NamedTuple):
    """Heads of one rank. Its fused projection holds [q heads | k heads | v heads]."""

    queries: int
    kv: int
    width: int
    scale: float  # factor on the products of queries and keys
    cap: float  # bound on scores, cap tanh(scores / cap); 0: none


class AttentionCore(Protocol):
    """Attention proper, between the projections of a layer.

    `visibility` is that of whole sequences. `pass_.whole` has the addresses of queries and keys.
    """

    def __call__(
        self,
        qkv: Tensor,
        heads: Heads,
        visibility: kernels.Visibility,
        dropout: kernels.AttentionDropout | None,
        pass_: Pass,
    ) -> Tensor:
        """Attend from qkv [B, T, (H + 2 Hkv) K] to [B, T, H K], both inside the region."""


def full_attention(
    qkv: Tensor,
    heads: Heads,
    visibility: kernels.Visibility,
    dropout: kernels.AttentionDropout | None,
    pass_: Pass,
) -> Tensor:
    """Attend over whole sequences on one rank: the core of a layer that was given none."""
    return ops.attention(
        qkv,
        heads=heads.queries,
        kv_heads=heads.kv,
        visibility=visibility,
        dropout=dropout,
        scale=heads.scale,
        cap=heads.cap,
    )


class _Attending(Module):
    """Attention in front of its output projection."""

    out: RowParallelLinear

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Attend from x [B, T_local, D] to the same shape, both outside the region."""
        return self.out(self._attended(x, pass_), pass_)

    def branch(self, x: Tensor, pass_: Pass) -> tuple[Tensor, Parameter | None]:
        """Return the same, and the bias that the next norm is to add (`RowParallelLinear`)."""
        return self.out.branch(self._attended(x, pass_), pass_)

    def _attended(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the heads' outputs [B, T, H K] inside the region."""
        raise TypeError(f"{type(self).__name__} does not define _attended")


class Attention(_Attending):
    """Multi-head attention (Vaswani et al. 2017).

    Heads are `head_width` channels wide (default: dim / heads). `qk_norm` normalises queries and
    keys, `rotary` turns them. With `window` > 0 a query sees that many positions, its own included
    (Beltagy et al. 2020, arXiv:2004.05150). `out_bias` is `bias` unless given. Products of queries
    and keys are multiplied by `scale` (default: head_width^-0.5), and bounded by `cap` unless it is
    0, as cap tanh(scores / cap) (Gemma 2, arXiv:2408.00118, 2).

    It is grouped-query attention if kv_heads < heads (Ainslie et al. 2023, arXiv:2305.13245). The
    fused projection is laid out [q heads | k heads | v heads]. Each rank holds heads / tp query
    heads and kv_heads / tp key-value heads. Where tp does not divide kv_heads it computes some of
    their channels, and the ranks gather the heads that they need (`parallel/heads.py`). The pass
    may replace `core` by the layer's name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        region: Region,
        *,
        bias: bool,
        std: float,
        out_std: float,
        dropout: Dropout,
        causal: bool = True,
        head_width: int | None = None,
        out_bias: bool | None = None,
        qk_norm: HeadNorm | WidthNorm | None = None,
        rotary: Rotary | None = None,
        window: int = 0,
        scale: float | None = None,
        cap: float = 0.0,
        core: AttentionCore = full_attention,
    ) -> None:
        width, comm = head_width or dim // heads, region.comm
        self.own = own_heads(heads, kv_heads, comm)
        queries, groups = (
            Segment(heads * width, ("tp",), width),
            Segment(kv_heads * width, ("tp",), width if self.own.divides else 1),
        )
        scale = width**-0.5 if scale is None else scale
        self.heads = Heads(self.own.queries, len(self.own.kv), width, scale, cap)
        self.first_head = comm.rank * self.heads.queries
        self.rotary, self.causal, self.window, self.core = rotary, causal, window, core
        pad = not self.own.divides
        out = queries, groups, groups
        self.qkv = ColumnParallelLinear(dim, out, region, bias=bias, std=std, pad=pad)
        self.qk_norm = qk_norm
        out_bias = bias if out_bias is None else out_bias
        self.out = RowParallelLinear(queries, dim, region, bias=out_bias, std=out_std)
        self.dropout = dropout

    def _attended(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the heads' outputs [B, T, H K] inside the region."""
        qkv = self.qkv(x, pass_)  # [B, T, (H + 2 Hkv) K] of the whole sequence
        heads = self.heads
        if not self.own.divides:
            qkv = complete(qkv, self.own, heads.width, self.qkv.region.comm)
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv, heads.queries, heads.kv)
        if self.rotary is not None:
            cos, sin = self.rotary.tables(pass_.whole, sum_dtype(qkv.dtype))
            qkv = ops.rotary(qkv, heads=heads.queries, kv_heads=heads.kv, cos=cos, sin=sin)
        core = self.core if pass_.cache is None else pass_.cache.get(self.name, self.core)
        visibility = pass_.visibility(self.causal, self.window)
        return core(qkv, heads, visibility, self._dropout(pass_), pass_)

    def _dropout(self, pass_: Pass) -> kernels.AttentionDropout | None:
        if not self.dropout.p or not pass_.training:
            return None
        where = pass_.whole
        samples, times = where.addresses()
        return kernels.AttentionDropout(
            self.dropout.p, self.dropout.key(where), samples, self.first_head, times, times
        )


class MemoryKeys:
    """Keys and values of a layer's memory, kept while a sequence is decoded.

    `found` is None until the pass that brings the memory.
    """

    found: tuple[Tensor, kernels.Visibility] | None = None  # kv [B, S, 2 H K], its visible keys

    def rows(self, index: Any) -> MemoryKeys:
        """Return those of some rows: views for a slice, copies for int64 [B']."""
        if self.found is None:
            return self  # the pass that brings the memory is one of all rows
        kv, visibility = self.found
        lengths, part = visibility.key_lengths, MemoryKeys()
        assert lengths is not None
        kept = kernels.Visibility(causal=False, key_lengths=lengths[index])
        part.found = Tensor(kv.data[placed(kv.data, index)]), kept
        return part


class CrossAttention(_Attending):
    """Multi-head attention whose keys and values come from a memory (Vaswani et al. 2017, 3.2.3).

    Queries come from x, keys and values from `Pass.memory`, which is inside the region already: it
    enters once for all layers of a stage. With a cache the memory is projected once.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        region: Region,
        *,
        bias: bool,
        std: float,
        out_std: float,
        dropout: Dropout,
    ) -> None:
        channels = Segment(dim, ("tp",), dim // heads)
        self.heads = heads // region.comm.size
        self.first_head = region.comm.rank * self.heads
        self.q = ColumnParallelLinear(dim, (channels,), region, bias=bias, std=std)
        self.kv = ColumnParallelLinear(dim, (channels, channels), region, bias=bias, std=std)
        self.out = RowParallelLinear(channels, dim, region, bias=bias, std=out_std)
        self.dropout = dropout

    def _attended(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the heads' outputs [B, T, H K] inside the region."""
        kv, visibility = self._keys(pass_)
        dropout = self._dropout(pass_)
        q = self.q(x, pass_)
        return ops.cross_attention(q, kv, heads=self.heads, visibility=visibility, dropout=dropout)

    def _keys(self, pass_: Pass) -> tuple[Tensor, kernels.Visibility]:
        memory, kept = pass_.memory, None
        if pass_.cache is not None:
            kept = pass_.cache[self.name]
            if memory is None:
                return kept.found
        assert memory is not None, "cross-attention needs a memory"
        kv = self.kv.mapped(memory.states, self.kv.bias)  # [B, S, 2 H K]
        found = kv, memory.limits.visibility(causal=False)
        if kept is not None:
            kept.found = found
        return found

    def _dropout(self, pass_: Pass) -> kernels.AttentionDropout | None:
        if not self.dropout.p or not pass_.training or pass_.memory is None:
            return None
        samples, times = pass_.whole.addresses()
        return kernels.AttentionDropout(
            self.dropout.p,
            self.dropout.key(pass_.whole),
            samples,
            self.first_head,
            times,
            pass_.memory.where.addresses()[1],
        )
