"""One run of the yardstick in a benchmark, GPT-2 in PyTorch: `torch_run PART OPTIONS`.

The code is that of a typical PyTorch user. Prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.base.device import CPU
from minillm.bench.shapes import Shape
from minillm.bench.subjects import SUBJECTS
from minillm.bench.timing import repeated
from minillm.bench.torch_models import MODELS

Cache = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D = shape.dim
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        """Map x [B, T, D] at positions from `start` on; `cache` receives keys and values."""
        B, T, D = x.shape
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        if cache is not None:
            for held, new in zip(cache, (k, v), strict=True):
                held[:, :, start : start + T] = new
            k, v = (held[:, :, : start + T] for held in cache)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None or T > 1)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 with a tied head; called with ids and targets [B, T], returns the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.dim)
        self.positions = nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def likeliest(self, ids: Tensor, caches: list[Cache], start: int) -> Tensor:
        """Return the likeliest token [B, 1] after ids [B, T] at positions from `start` on."""
        x = self.tokens(ids) + self.positions.weight[start : start + ids.shape[1]]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = cast(Block, block)(x, cache, start)
        return F.linear(self.norm(x[:, -1:]), self.tokens.weight).argmax(-1)


def train(
    seconds: float,
    *,
    warmup: int,
    device: str,
    dtype: str,
    fused: bool,
    compiled: bool,
    **sizes: int,
) -> dict[str, Any]:
    """Time steps: forward, backward, clipping of the gradient's norm at 1, and AdamW.

    Under bfloat16 (autocast) the weights stay float32.
    """
    shape = Shape(**sizes)
    model: Any = GPT2(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)
    run = torch.compile(model) if compiled else model
    ids = torch.randint(shape.vocab, (shape.batch, shape.context + 1)).to(device)
    narrow = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        optimizer.zero_grad()
        with narrow:
            loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    found: dict[str, Any] = {"step": repeated(step, seconds, repeats=3, warmup=warmup)}
    return found | ({"peak_rss": torch.cuda.max_memory_reserved()} if device == "cuda" else {})


def model(seconds: float, *, subject: str, tuned: bool) -> dict[str, Any]:
    """Time training steps of a family on the batches of its subject, as `train` does."""
    chosen = SUBJECTS[subject]
    config = chosen.config(1)
    task, rows = chosen.task(config), np.arange(config.options.optimization.batch)
    net = MODELS[chosen.family](config.model)
    optimizer, numbers = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=tuned), count()

    def step() -> float:
        batch = task.batch(next(numbers), rows, CPU)
        arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        if batch.memory is not None:
            arrays["lengths"] = torch.from_numpy(batch.memory.lengths)
        optimizer.zero_grad()
        loss = net(arrays)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return {"step": repeated(step, seconds, repeats=chosen.repeats, warmup=chosen.warmup)}


def attention(
    seconds: float, *, batch: int, context: int, heads: int, width: int, causal: bool
) -> dict[str, Any]:
    """Time scaled_dot_product_attention on views into a fused projection."""
    qkv = torch.randn(batch, context, 3, heads, width)
    q, k, v = (qkv[:, :, i].transpose(1, 2).detach().requires_grad_() for i in range(3))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    grad = torch.randn_like(y)

    def forward() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def backward() -> None:
        torch.autograd.grad(y, (q, k, v), grad, retain_graph=True)

    return {"forward": repeated(forward, seconds), "backward": repeated(backward, seconds)}


def head(seconds: float, *, rows: int, dim: int, vocab: int) -> dict[str, Any]:
    """Time the loss with dX and dW."""
    x = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    targets = torch.randint(vocab, (rows,))

    def both() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, weight), targets), (x, weight))

    return {"loss and gradients": repeated(both, seconds)}


@torch.inference_mode()
def generate(seconds: float, *, prompt: int, **sizes: int) -> dict[str, Any]:
    """Time the prompt, read at once, and each likeliest next token, with a preallocated cache."""
    shape = Shape(**sizes)
    model = GPT2(shape)
    ids = torch.randint(shape.vocab, (shape.batch, prompt))
    size = (shape.batch, shape.heads, shape.context, shape.dim // shape.heads)
    caches: list[Cache] = []
    new, position = ids, 0

    def read() -> None:
        nonlocal caches, new, position
        caches = [(torch.empty(size), torch.empty(size)) for _ in range(shape.layers)]
        new, position = model.likeliest(ids, caches, 0), prompt

    def write() -> None:
        nonlocal new, position
        new, position = model.likeliest(new, caches, position), position + 1

    prompts = repeated(read, seconds)
    tokens = repeated(write, seconds, repeats=0, warmup=0, at_most=shape.context - prompt)
    return {"prompt": prompts, "token": tokens}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "model": model,
    "attention": attention,
    "head": head,
    "generate": generate,
}


def main() -> None:
    """Measure the part that the command line names and print the result."""
    part, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(options.pop("threads"))
    torch.manual_seed(0)
    found = PARTS[part](**options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_rss": peak} | found))


if __name__ == "__main__":
    main()
