"""The yardstick: GPT-2 in PyTorch as a PyTorch user would write it, one turn of steps, one line of
JSON.

A step is forward, backward, clipping the gradient's global norm at 1, and AdamW. Run by
`minillm.bench train --against torch`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.bench.shapes import Shape


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D = shape.dim
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, D = x.shape
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 with a tied head; called with ids and targets [B, T], returns the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(shape.vocab, shape.dim),
            nn.Embedding(shape.context, shape.dim),
        )
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss."""
        x = self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        return F.cross_entropy(
            F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), targets.flatten()
        )


def main() -> None:
    """Time steps and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in Shape._fields:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", help="bfloat16: under autocast, the weights stay float32"
    )
    args = parser.parse_args()
    shape = Shape(*(getattr(args, name) for name in Shape._fields))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model: Any = GPT2(shape).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.fused or None)
    run = torch.compile(model) if args.compile else model
    ids = torch.randint(shape.vocab, (shape.batch, shape.context + 1)).to(args.device)
    narrow = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step() -> float:
        optimizer.zero_grad()
        with narrow:
            loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    for _ in range(args.warmup):
        step()
    times: list[float] = []
    while len(times) < 3 or sum(times) < args.seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device == "cuda":
        used = torch.cuda.max_memory_reserved()
    print(json.dumps({"times": times, "peak_rss": used}))


if __name__ == "__main__":
    main()
