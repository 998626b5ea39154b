"""The yardstick for parts of a model: PyTorch as its users write it, one turn, one line of JSON.
Run by `minillm.bench.parts`."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.bench.parts import turn_options
from minillm.bench.shapes import Shape
from minillm.bench.timing import repeated
from minillm.bench.torch_gpt import GPT2, Block

Times = dict[str, list[float]]


def attention(
    seconds: float, *, batch: int, context: int, heads: int, width: int, causal: int
) -> Times:
    """scaled_dot_product_attention on views into a fused projection."""
    qkv = torch.randn(batch, context, 3, heads, width)
    q, k, v = (qkv[:, :, i].transpose(1, 2).detach().requires_grad_() for i in range(3))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal))
    grad = torch.randn_like(y)

    def forward() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal))

    return {
        "forward": repeated(forward, seconds),
        "backward": repeated(
            lambda: torch.autograd.grad(y, (q, k, v), grad, retain_graph=True), seconds
        ),
    }


def head(seconds: float, *, rows: int, dim: int, vocab: int) -> Times:
    """Loss, dX and dW."""
    x, weight = (
        torch.randn(rows, dim, requires_grad=True),
        torch.randn(vocab, dim, requires_grad=True),
    )
    targets = torch.randint(vocab, (rows,))
    return {
        "loss and gradients": repeated(
            lambda: torch.autograd.grad(F.cross_entropy(F.linear(x, weight), targets), (x, weight)),
            seconds,
        )
    }


def generate(
    seconds: float,
    *,
    layers: int,
    heads: int,
    dim: int,
    context: int,
    vocab: int,
    prompt: int,
    batch: int,
) -> Times:
    """The prompt at once, then the likeliest token, again and again, with a preallocated cache."""
    model = GPT2(Shape(layers, heads, dim, context, batch, vocab))
    ids = torch.randint(vocab, (batch, prompt))

    def caches() -> list[tuple[Tensor, Tensor]]:
        size = (batch, heads, context, dim // heads)
        return [(torch.empty(size), torch.empty(size)) for _ in range(layers)]

    times: list[float] = []
    with torch.inference_mode():
        prompts = repeated(lambda: _next(model, caches(), ids, 0), seconds)
        filled = caches()
        new, position = _next(model, filled, ids, 0), prompt
        while position < context and sum(times) < seconds:
            start = time.perf_counter()
            new, position = _next(model, filled, new, position), position + 1
            times.append(time.perf_counter() - start)
    return {"prompt": prompts, "token": times}


def _next(model: GPT2, caches: list[tuple[Tensor, Tensor]], ids: Tensor, start: int) -> Tensor:
    """The likeliest token [B, 1] after ids [B, T] at position `start`."""
    x = model.tokens(ids) + model.positions.weight[start : start + ids.shape[1]]
    for block, cache in zip(model.blocks, caches, strict=True):
        x = _cached(cast(Block, block), x, cache, start)
    return F.linear(model.norm(x[:, -1:]), model.tokens.weight).argmax(-1)


def _cached(block: Block, x: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
    (keys, values), (B, T, D) = cache, x.shape
    q, k, v = (
        part.unflatten(2, (block.heads, -1)).transpose(1, 2)
        for part in block.qkv(block.norm1(x)).chunk(3, dim=2)
    )
    keys[:, :, start : start + T], values[:, :, start : start + T] = k, v
    y = F.scaled_dot_product_attention(
        q, keys[:, :, : start + T], values[:, :, : start + T], is_causal=T > 1
    )
    x = x + block.out(y.transpose(1, 2).reshape(B, T, D))
    return x + block.down(F.gelu(block.up(block.norm2(x)), approximate="tanh"))


PARTS: dict[str, Callable[..., Times]] = {
    "attention": attention,
    "head": head,
    "generate": generate,
}


def main() -> None:
    """Run the turn that the command line describes."""
    kind, sizes, seconds = turn_options()
    torch.set_num_threads(sizes.pop("threads"))
    torch.manual_seed(0)
    times = PARTS[kind](seconds, **sizes)
    print(
        json.dumps(times | {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
    )


if __name__ == "__main__":
    main()
