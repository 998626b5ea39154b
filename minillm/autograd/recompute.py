"""Recomputation: a part of the tape that keeps its inputs alone and is run again by the backward
pass.

The replay is a backward pass within the backward pass: it shares what is deferred and who observes,
so a parameter is reported complete after its last use, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.autograd.backward import BackwardRun, run_backward
from minillm.autograd.tape import (
    Context,
    Function,
    GradSlot,
    Leaf,
    Tensor,
    is_grad_enabled,
    leaf_recorder,
    no_grad,
    with_grad,
)
from minillm.base.arrays import Array


class _Checkpoint(Function):
    @staticmethod
    def forward(ctx: Context, *inputs: Array, fn: Callable[..., Any]) -> Any:
        used: list[Leaf] = []
        token = leaf_recorder.set(used)
        try:
            with no_grad():
                out = fn(*(Tensor(x) for x in inputs))
        finally:
            leaf_recorder.reset(token)
        outer = leaf_recorder.get()
        if outer is not None:
            outer.extend(leaf for leaf in used if leaf not in outer)
        if is_grad_enabled():
            ctx.extra_leaves = tuple(used)
            ctx.recording = ctx.recording or bool(used)
        ctx.save(fn, *inputs)
        return tuple(t.data for t in out) if isinstance(out, tuple) else out.data

    @staticmethod
    def backward(
        ctx: Context,
        grad_outs: tuple[Array | None, ...],
        needs: tuple[bool, ...],
        into: tuple[GradSlot | None, ...],
    ) -> tuple[Any, ...]:
        fn, *inputs = ctx.saved
        leaves = [Tensor(x, need) for x, need in zip(inputs, needs, strict=True)]
        with with_grad():
            out = fn(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        replay = BackwardRun(ctx.run.defer, ctx.run.observer, outer=ctx.run)
        run_backward(
            [(t, g) for t, g in zip(outs, grad_outs, strict=False) if g is not None], replay
        )
        if ctx.run.observer is not None:
            for leaf in ctx.extra_leaves:
                if id(leaf) not in replay.uses:
                    ctx.run.used(leaf)
        return tuple(leaf.grad for leaf in leaves)


def checkpoint(fn: Callable[..., Any], *inputs: Tensor) -> Any:
    """Run `fn(*inputs)` without keeping its intermediate arrays; backward runs it again (Chen et
    al. 2016, arXiv:1604.06174).

    `fn` takes and returns tensors and must compute the same thing twice: dropout does, because
    masks are addressed, not drawn.
    """
    return _Checkpoint.apply(*inputs, fn=fn)
