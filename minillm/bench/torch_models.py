"""Models of `minillm bench models` in PyTorch, as a typical user writes them.

Each is called with the arrays of a batch and returns the mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Arrays = Mapping[str, Tensor]


class Attention(nn.Module):
    """Attention of x to itself or to `memory`, with grouped keys and optional rotary positions."""

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int | None = None,
        bias: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.groups, self.cross = (
            dim // heads,
            heads,
            groups or heads,
            cross,
        )
        self.sizes = [dim, self.groups * self.width, self.groups * self.width]
        if cross:
            self.q, self.kv = nn.Linear(dim, dim, bias), nn.Linear(dim, 2 * dim, bias)
        else:
            self.qkv = nn.Linear(dim, sum(self.sizes), bias)
        self.out = nn.Linear(dim, dim, bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map x [B, T, D]; `mask` is bool and broadcasts to [B, H, T, S]."""
        if self.cross:
            q, (k, v) = self.q(x), self.kv(memory).chunk(2, -1)
        else:
            q, k, v = self.qkv(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (q, k, v))
        if rotary is not None:
            q, k = (_rotate(part, *rotary) for part in (q, k))
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, enable_gqa=self.groups != self.heads
        )
        return self.out(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Encoder(nn.Module):
    """BERT without token types in its batches: post-norm, and a head on the masked positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.tokens, self.types = nn.Embedding(config.vocab, dim), nn.Embedding(2, dim)
        self.positions, self.norm = nn.Embedding(config.context, dim), nn.LayerNorm(dim, eps)
        self.attention = nn.ModuleList(Attention(dim, config.heads) for _ in range(config.layers))
        self.up, self.down, self.norm1, self.norm2 = (
            nn.ModuleList(make() for _ in range(config.layers))
            for make in (
                lambda: nn.Linear(dim, config.ffn_dim),
                lambda: nn.Linear(config.ffn_dim, dim),
                lambda: nn.LayerNorm(dim, eps),
                lambda: nn.LayerNorm(dim, eps),
            )
        )
        self.dense, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab))

    def forward(self, batch: Arrays) -> Tensor:
        """Return the mean loss of the masked tokens."""
        ids = batch["tokens"]
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]] + self.types(batch["types"])
        x = self.norm(x)
        layers = (self.attention, self.up, self.down, self.norm1, self.norm2)
        for attention, up, down, norm1, norm2 in zip(*layers, strict=True):
            x = norm1(x + attention(x))
            x = norm2(x + down(F.gelu(up(x))))
        rows = self.head_norm(F.gelu(self.dense(x.flatten(0, 1)[batch["masked"]])))
        return F.cross_entropy(F.linear(rows, self.tokens.weight, self.bias), batch["originals"])


class Translator(nn.Module):
    """The Transformer of Vaswani et al. 2017, pre-norm, with one table for both sides."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, self.dropout, self.smoothing = config.dim, config.dropout, config.label_smoothing
        self.tokens = nn.Embedding(config.vocab, dim)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        angles = torch.arange(config.context)[:, None] * torch.exp(
            torch.arange(0, dim, 2) * (-math.log(10000.0) / dim)
        )
        self.register_buffer("positions", torch.stack((angles.sin(), angles.cos()), -1).flatten(1))
        numbers = config.encoder_layers, config.decoder_layers
        self.encoder, self.decoder = (
            nn.ModuleList(self._layer(config, cross) for _ in range(number))
            for cross, number in enumerate(numbers)
        )
        self.memory_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    @staticmethod
    def _layer(config: Any, cross: int) -> nn.ModuleDict:
        dim = config.dim
        parts: dict[str, nn.Module] = {
            "norm1": nn.LayerNorm(dim),
            "attention": Attention(dim, config.heads),
            "norm2": nn.LayerNorm(dim),
            "mlp": nn.Sequential(
                nn.Linear(dim, config.ffn_dim), nn.ReLU(), nn.Linear(config.ffn_dim, dim)
            ),
        }
        if cross:
            parts |= {
                "cross_norm": nn.LayerNorm(dim),
                "cross": Attention(dim, config.heads, cross=True),
            }
        return nn.ModuleDict(parts)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _embedded(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) * math.sqrt(self.tokens.embedding_dim)
        return self._drop(x + self.positions[: ids.shape[1]])

    def forward(self, batch: Arrays) -> Tensor:
        """Return the smoothed mean loss of the target tokens."""
        seen = (torch.arange(batch["source"].shape[1]) < batch["lengths"][:, None])[:, None, None]
        x = self._embedded(batch["source"])
        for layer in self.encoder:
            x = x + self._drop(layer["attention"](layer["norm1"](x), mask=seen))
            x = x + self._drop(layer["mlp"](layer["norm2"](x)))
        memory = self.memory_norm(x)
        x = self._embedded(batch["target"])
        for layer in self.decoder:
            x = x + self._drop(layer["attention"](layer["norm1"](x), causal=True))
            x = x + self._drop(layer["cross"](layer["cross_norm"](x), memory, mask=seen))
            x = x + self._drop(layer["mlp"](layer["norm2"](x)))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(
            logits.flatten(0, 1), batch["targets"].flatten(), label_smoothing=self.smoothing
        )


class Recurrent(nn.Module):
    """torch.nn.LSTM between an embedding and a head. The state goes on from call to call."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.lstm = nn.LSTM(config.dim, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: Arrays) -> Tensor:
        """Return the mean loss."""
        x, (h, c) = self.lstm(self.tokens(batch["tokens"]), self.state)
        self.state = h.detach(), c.detach()
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["targets"].flatten())


class Llama(nn.Module):
    """Llama with a tied head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.tokens = nn.Embedding(config.vocab, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(dim, eps),
                    "attention": Attention(dim, config.heads, config.kv_heads, bias=False),
                    "norm2": nn.RMSNorm(dim, eps),
                    "gate": nn.Linear(dim, config.ffn_dim, bias=False),
                    "up": nn.Linear(dim, config.ffn_dim, bias=False),
                    "down": nn.Linear(config.ffn_dim, dim, bias=False),
                }
            )
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(dim, eps)
        width = dim // config.heads
        rates = config.rope_base ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(config.context), torch.cat((rates, rates)))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, batch: Arrays) -> Tensor:
        """Return the mean loss."""
        x, length = self.tokens(batch["tokens"]), batch["tokens"].shape[1]
        rotary = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x), causal=True, rotary=rotary)
            y = block["norm2"](x)
            x = x + block["down"](F.silu(block["gate"](y)) * block["up"](y))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "bert": Encoder,
    "seq2seq": Translator,
    "lstm": Recurrent,
    "gpt": Llama,
}
"""By family."""
