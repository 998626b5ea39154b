"""Layers in a trace: spans for forward and backward of each block, the embedding and the head.

They divide the spans of the pipeline's actions. A model that is not traced runs no code of this
module. On a GPU a span is the time in which the host queues the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import Context, Function, is_grad_enabled
from minillm.base.arrays import Array
from minillm.base.trace import Tracer
from minillm.models.gpt import GPT
from minillm.nn.block import Block, Stream
from minillm.params.where import Pass


def trace_layers(model: Any, tracer: Tracer) -> None:
    """Replace the blocks of `model` by ones that record their spans. Ignores other models than GPT.

    Their parameters, names and results stay.
    """
    if isinstance(model, GPT):
        layers = list(model.blocks)
        for layer, block in model.blocks.items():
            model.blocks[layer] = _TracedBlock(
                block,
                f"block {layer}",
                tracer,
                embeds=layer == layers[0] and model.embedding is not None,
                predicts=layer == layers[-1] and model.head is not None,
                replays=model.recompute == "full",
            )


class _TracedBlock(Block):
    """Block that tells a tracer when its forward and its backward pass begin.

    `embeds`: the embedding is before it. `predicts`: the head is behind it. `replays`: a pass that
    is on the tape is the replay of a recomputed one.
    """

    def __init__(
        self,
        block: Block,
        name: str,
        tracer: Tracer,
        *,
        embeds: bool,
        predicts: bool,
        replays: bool,
    ) -> None:
        self.block = block
        self.title, self.tracer, self.replays = name, tracer, replays
        self.embeds, self.predicts = embeds, predicts

    def forward(self, stream: Stream, pass_: Pass) -> Stream:
        """Return the stream behind the block, with the block's parts of the trace."""
        part, replay = self.tracer.part, self.replays and is_grad_enabled()
        head = "head backward" if self.predicts else ""
        before = "embedding forward" if self.embeds else ""
        if self.embeds:
            stream = _marked(stream, lambda: part("embedding backward"))
        part(f"{self.title} forward", before=head if replay else before)
        stream = self.block(stream, pass_)
        if self.predicts and not replay:
            part("head forward")
        return _marked(stream, lambda: part(f"{self.title} backward", before=head))


def _marked(stream: Stream, reached: Callable[[], None]) -> Stream:
    """Return `stream` unchanged; backward calls `reached` before it goes on from there."""
    tensors = _Mark.apply(*(x for x in stream[:2] if x is not None), reached=reached)
    return stream._replace(**dict(zip(("x", "delta"), tensors, strict=False)))


class _Mark(Function):
    """Identity with a callback in its backward pass."""

    @staticmethod
    def forward(ctx: Context, *inputs: Array, reached: Callable[[], None]) -> tuple[Array, ...]:
        ctx.save(reached)
        return inputs

    @staticmethod
    def backward(
        ctx: Context,
        grad_outs: tuple[Array | None, ...],
        needs: tuple[bool, ...],
        into: tuple[GradSlot | None, ...],
    ) -> tuple[Any, ...]:
        ctx.load(0)()
        return grad_outs
