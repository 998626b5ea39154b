"""Recomputation: a part of the tape keeps its inputs alone, and the backward pass replays it.

The replay is a backward pass within the backward pass. It shares the deferred work and the
observer, so a parameter is reported complete after its last use, inside or outside the part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.autograd.backward import BackwardRun, run_backward
from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import (
    Context,
    Function,
    Leaf,
    Tensor,
    is_grad_enabled,
    leaf_recorder,
    no_grad,
    with_grad,
)
from minillm.base.arrays import Array


class _Recomputed(Function):
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
        ctx.save(fn, *(ctx.input(i) for i in range(len(inputs))))
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


def recomputed(fn: Callable[..., Any], *inputs: Tensor) -> Any:
    """Run `fn(*inputs)` keeping its inputs alone: backward runs it a second time.

    Activation checkpointing (Chen et al. 2016, arXiv:1604.06174). `fn` takes and returns tensors,
    and must be deterministic. Dropout is, because its masks are functions of addresses.
    """
    return _Recomputed.apply(*inputs, fn=fn)
