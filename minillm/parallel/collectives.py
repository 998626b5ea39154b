"""Differentiable collectives: changes of an activation's layout over the ranks of one mesh axis.

R replicated, S(d) sharded on dim d, P partial sum. Each function is the adjoint of another one in
the table.

| function | value | gradient | forward / backward |
|---|---|---|---|
| `copy_to(x, comm)` | R -> R | P -> R | identity / all-reduce |
| `reduce_from(x, comm)` | P -> R | R -> R | all-reduce / identity |
| `all_gather(x, comm, dim)` | S(d) -> R | P -> S(d) | all-gather / reduce-scatter |
| `reduce_scatter(x, comm, dim)` | P -> S(d) | S(d) -> R | reduce-scatter / all-gather |
| `gather_from(x, comm, dim)` | S(d) -> R | R -> S(d) | all-gather / slice |
| `scatter_to(x, comm, dim)` | R -> S(d) | S(d) -> R | slice / all-gather |
| `all_to_all(x, comm, s, c)` | S(c) -> S(s) | S(s) -> S(c) | split s, concat c / the reverse |

Tensor parallelism enters a column-parallel product by `copy_to` and leaves a row-parallel one by
`reduce_from`. Sequence parallelism uses `all_gather` and `reduce_scatter` instead. `gather_from`
and `scatter_to` serve replicated parts, `all_to_all` context and expert parallelism.

On a communicator of size 1 every function returns its input and adds no node. (Shoeybi et al. 2019,
arXiv:1909.08053, section 3; Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace, writeable
from minillm.comm.communicator import Communicator


def copy_to(x: Tensor, comm: Communicator) -> Tensor:
    """Return x, R -> R, for consumers whose gradients are partial sums: each does its part."""
    if comm.size == 1:
        return x
    y = _CopyTo.apply(x, comm=comm)
    y.recipe = x.recipe  # the same array
    return y


def reduce_from(x: Tensor, comm: Communicator) -> Tensor:
    """All-reduce x, P -> R.

    Overwrites `x`, which must be the fresh result of an operation that does not keep it (a matrix
    product, an embedding).
    """
    return x if comm.size == 1 else _ReduceFrom.apply(x, comm=comm)


def all_gather(
    x: Tensor, comm: Communicator, dim: int, sizes: Sequence[int] | None = None
) -> Tensor:
    """Gather x, S(dim) -> R, for consumers whose gradients are partial sums.

    `sizes[r]` is the length of rank r's shard; None: all are alike.
    """
    return x if comm.size == 1 else _AllGather.apply(x, comm=comm, dim=dim, sizes=sizes)


def reduce_scatter(
    x: Tensor, comm: Communicator, dim: int, sizes: Sequence[int] | None = None
) -> Tensor:
    """Sum x and scatter it, P -> S(dim), in shards of `sizes`; None: equal ones."""
    return x if comm.size == 1 else _ReduceScatter.apply(x, comm=comm, dim=dim, sizes=sizes)


def gather_from(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """Gather x, S(dim) -> R, for replicated consumers, which agree on the gradient."""
    return x if comm.size == 1 else _GatherFrom.apply(x, comm=comm, dim=dim)


def scatter_to(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """Keep this rank's slice of x, R -> S(dim)."""
    return x if comm.size == 1 else _ScatterTo.apply(x, comm=comm, dim=dim)


def all_to_all(x: Tensor, comm: Communicator, split_dim: int, concat_dim: int) -> Tensor:
    """Exchange slices of x, S(concat_dim) -> S(split_dim).

    Slices of `split_dim` are sent, and those received are joined along `concat_dim`.
    """
    return (
        x
        if comm.size == 1
        else _AllToAll.apply(x, comm=comm, split_dim=split_dim, concat_dim=concat_dim)
    )


def own_slice(x: Array, comm: Communicator, dim: int) -> Array:
    """Return this rank's view of `x` cut evenly along `dim`."""
    size = x.shape[dim] // comm.size
    return x[(slice(None),) * dim + (slice(comm.rank * size, (comm.rank + 1) * size),)]


def _writable(ctx: Context, grad: Array) -> Array:
    """Return `grad` if backward may overwrite it, else a copy; contiguous either way."""
    xp = namespace(grad)
    return (
        grad
        if ctx.owns(0) and grad.flags.c_contiguous and writeable(grad)
        else xp.array(grad, order="C")
    )


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, comm: Communicator) -> Array:
        ctx.save(comm)
        return x

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (comm,) = ctx.saved
        grad = _writable(ctx, grad_outs[0])
        comm.all_reduce_(grad)
        return (grad,)


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, comm: Communicator) -> Array:
        comm.all_reduce_(x)
        return x

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        return (grad_outs[0],)


class _AllGather(Function):
    @staticmethod
    def forward(
        ctx: Context, x: Array, *, comm: Communicator, dim: int, sizes: Sequence[int] | None
    ) -> Array:
        ctx.save(comm, dim, sizes)
        return comm.all_gather(x, dim, sizes)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        comm, dim, sizes = ctx.saved
        return (comm.reduce_scatter(grad_outs[0], dim, sizes),)


class _ReduceScatter(Function):
    @staticmethod
    def forward(
        ctx: Context, x: Array, *, comm: Communicator, dim: int, sizes: Sequence[int] | None
    ) -> Array:
        ctx.save(comm, dim, sizes)
        return comm.reduce_scatter(x, dim, sizes)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        comm, dim, sizes = ctx.saved
        return (comm.all_gather(grad_outs[0], dim, sizes),)


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, comm: Communicator, dim: int) -> Array:
        ctx.save(comm, dim)
        return comm.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        comm, dim = ctx.saved
        return (own_slice(grad_outs[0], comm, dim),)


class _ScatterTo(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, comm: Communicator, dim: int) -> Array:
        ctx.save(comm, dim)
        return own_slice(x, comm, dim)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        comm, dim = ctx.saved
        return (comm.all_gather(grad_outs[0], dim),)


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Context, x: Array, *, comm: Communicator, split_dim: int, concat_dim: int
    ) -> Array:
        ctx.save(comm, split_dim, concat_dim)
        return _exchange(x, comm, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        comm, split_dim, concat_dim = ctx.saved
        return (_exchange(grad_outs[0], comm, concat_dim, split_dim),)


def _exchange(x: Array, comm: Communicator, split_dim: int, concat_dim: int) -> Array:
    xp = namespace(x)
    parts = [xp.ascontiguousarray(part) for part in xp.split(x, comm.size, split_dim)]
    return xp.concatenate(comm.all_to_all(parts, [part.shape for part in parts]), concat_dim)
