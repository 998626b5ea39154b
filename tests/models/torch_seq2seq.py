"""Plain PyTorch encoder-decoder that takes minillm's weights by name."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from minillm.models.seq2seq_config import Seq2SeqConfig

ACTIVATIONS = {"relu": F.relu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


class TorchSeq2Seq:
    """Functional model over a dict of named tensors."""

    def __init__(self, config: Seq2SeqConfig, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.p = {
            name: torch.tensor(np.ascontiguousarray(value), requires_grad=True)
            for name, value in weights.items()
        }

    def logits(self, source: torch.Tensor, lengths: list[int], target: torch.Tensor):
        """Return the logits [B, T, V] for sources [B, S] of these lengths and targets [B, T]."""
        c, pre = self.config, self.config.norm_place == "pre"
        S, T = source.shape[1], target.shape[1]
        seen = torch.arange(S)[None, None, None] < torch.tensor(lengths)[:, None, None, None]
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        x = self._embed("source", source)
        for layer in range(c.encoder_layers):
            at = f"blocks.{layer}."
            x = self._half(at + "norm1", x, lambda y, at=at: self._self(at, y, seen))
            x = self._half(at + "norm2", x, lambda y, at=at: self._mlp(at, y))
        memory = self._norm("memory_norm", x) if pre else x
        x = self._embed("target", target)
        for layer in range(c.encoder_layers, c.layers):
            at = f"blocks.{layer}."
            x = self._half(at + "norm1", x, lambda y, at=at: self._self(at, y, causal))
            x = self._half(at + "cross_norm", x, lambda y, at=at: self._cross(at, y, memory, seen))
            x = self._half(at + "norm2", x, lambda y, at=at: self._mlp(at, y))
        x = self._norm("norm", x) if pre else x
        logits = x @ self.p["embedding.weight" if c.tied else "head"].T
        return logits + self.p["head_bias"] if c.head_bias else logits

    def loss(self, source, lengths, target, targets) -> torch.Tensor:
        """Return the mean loss over targets that are not -100, smoothed."""
        logits, smoothing = self.logits(source, lengths, target), self.config.label_smoothing
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=smoothing
        )

    def _embed(self, side: str, ids: torch.Tensor) -> torch.Tensor:
        c, dim = self.config, self.config.dim
        table = self.p["embedding.weight" if c.tied else f"{side}_embedding.weight"]
        x = table[ids] * math.sqrt(dim)
        if c.position == "learned":
            return x + self.p[f"{side}_positions"][: ids.shape[1]]
        angles = [
            [t / 10000 ** (2 * i / dim) for i in range(dim // 2)] for t in range(ids.shape[1])
        ]
        rows = [
            [f(a) for f in (math.sin, math.cos) for a in row]
            if c.position == "halves"
            else [f(a) for a in row for f in (math.sin, math.cos)]
            for row in angles
        ]
        return x + torch.tensor(rows, dtype=x.dtype)

    def _half(self, norm: str, x: torch.Tensor, f) -> torch.Tensor:
        if self.config.norm_place == "pre":
            return x + f(self._norm(norm, x))
        return self._norm(norm, x + f(x))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.p[name + ".weight"], self.p[name + ".bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.p[name + ".weight"], self.p[name + ".bias"])

    def _self(self, at: str, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = self._linear(at + "attention.qkv", x).chunk(3, -1)
        return self._attend(at + "attention.out", q, k, v, seen)

    def _cross(self, at: str, x, memory, seen) -> torch.Tensor:
        k, v = self._linear(at + "cross.kv", memory).chunk(2, -1)
        return self._attend(at + "cross.out", self._linear(at + "cross.q", x), k, v, seen)

    def _attend(self, out: str, q, k, v, seen) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self._linear(out, y.transpose(1, 2).flatten(2))

    def _mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(
            at + "mlp.down", ACTIVATIONS[self.config.mlp](self._linear(at + "mlp.up", x))
        )
