"""Key-value heads that several tensor-parallel ranks need, where tp does not divide their number.

The projection cuts the channels of keys and values evenly, through heads, so no rank holds a weight
twice. `complete` gathers the channels, and each rank keeps the heads that its queries read. The
backward pass sums the gradients of all copies of a head, and gives each rank those of its channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace
from minillm.comm.communicator import Communicator
from minillm.parallel.tensor import Group


class OwnHeads(NamedTuple):
    """Query heads of a rank, and the key-value heads that they read.

    Equally many consecutive queries read each of `kv`, in order. A head may stand there twice.
    """

    queries: int
    kv: tuple[int, ...]  # numbers of key-value heads
    divides: bool  # tp divides the key-value heads: no two ranks need the same


def own_heads(heads: int, kv_heads: int, group: Group) -> OwnHeads:
    """Return the heads of a rank. `heads` is a multiple of `group.size` and of `kv_heads`."""
    queries, readers = heads // group.size, heads // kv_heads
    together = math.gcd(queries, readers)  # queries in a row, on every rank, that read one head
    first = group.rank * queries
    kv = tuple((first + at) // readers for at in range(0, queries, together))
    return OwnHeads(queries, kv, kv_heads % group.size == 0)


def complete(qkv: Tensor, own: OwnHeads, width: int, comm: Communicator) -> Tensor:
    """Complete the heads of keys and values, [B, T, H K + 2 n] -> [B, T, (H + 2 Hkv) K].

    H: query heads of this rank; Hkv: len(own.kv). n: channels that this rank computes of the keys,
    and as many of the values: those of all heads, padded to a multiple of the ranks and cut.
    Collective, and so is its backward pass.
    """
    return _Complete.apply(qkv, own=own, width=width, comm=comm)


class _Complete(Function):
    @staticmethod
    def forward(
        ctx: Context, qkv: Array, *, own: OwnHeads, width: int, comm: Communicator
    ) -> Array:
        xp, (B, T, size), split = namespace(qkv), qkv.shape, own.queries * width
        cut = qkv[..., split:].reshape(B, T, 2, (size - split) // 2)
        whole = comm.all_gather(xp.ascontiguousarray(cut), 3)  # [B, T, 2, padded channels]
        out = xp.empty((B, T, split + 2 * len(own.kv) * width), qkv.dtype)
        out[..., :split] = qkv[..., :split]
        mine = out[..., split:].reshape(B, T, 2, len(own.kv), width)
        for at, head in enumerate(own.kv):
            mine[..., at, :] = whole[..., head * width : (head + 1) * width]
        ctx.save(own, width, comm, size)
        return out

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (own, width, comm, size), grad = ctx.saved, grad_outs[0]
        xp, (B, T, _), split = namespace(grad), grad.shape, own.queries * width
        mine = grad[..., split:].reshape(B, T, 2, len(own.kv), width)
        whole = xp.zeros((B, T, 2, (size - split) // 2 * comm.size), grad.dtype)
        for at, head in enumerate(own.kv):
            whole[..., head * width : (head + 1) * width] += mine[..., at, :]
        out = xp.empty((B, T, size), grad.dtype)
        out[..., :split] = grad[..., :split]
        out[..., split:] = comm.reduce_scatter(whole, 3).reshape(B, T, size - split)
        return (out,)
