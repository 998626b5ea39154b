"""Plain PyTorch GPT that takes minillm's weights by name.

It is the independent witness of the parity tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from minillm.models.gpt_config import ModelConfig


class TorchGPT:
    """Functional model over a dict of named tensors; GPT-2 or Llama by configuration."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.p = {
            name: torch.tensor(np.ascontiguousarray(value), requires_grad=True)
            for name, value in weights.items()
        }

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, T, V] of ids [B, T]."""
        c, p = self.config, self.p
        x = F.embedding(ids, p["embedding.weight"])
        if c.position == "learned":
            x = x + p["positions"][: ids.shape[1]]
        for layer in range(c.layers):
            prefix = f"blocks.{layer}."
            x = x + self._attention(prefix + "attention.", self._norm(prefix + "norm1.", x))
            x = x + self._mlp(prefix + "mlp.", self._norm(prefix + "norm2.", x))
        head = p["embedding.weight"] if c.tied else p["head"]
        return self._norm("norm.", x) @ head.T

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.p[name + ".weight"], self.p.get(name + ".bias"))

    def _norm(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.p[prefix + "weight"]
        if self.config.norm == "layernorm":
            return F.layer_norm(x, weight.shape, weight, self.p.get(prefix + "bias"), 1e-5)
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def _attention(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        B, T, _ = x.shape
        K = c.head_width
        q, k, v = self._linear(prefix + "qkv", x).split(
            [c.heads * K, c.kv_heads * K, c.kv_heads * K], -1
        )
        q, k, v = (t.view(B, T, -1, K).transpose(1, 2) for t in (q, k, v))
        if c.position == "rotary":
            q, k = _rotate(q), _rotate(k)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=c.heads != c.kv_heads
        )
        return self._linear(prefix + "out", y.transpose(1, 2).reshape(B, T, -1))

    def _mlp(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        h = self._linear(prefix + "up", x)
        if self.config.mlp == "swiglu":
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate="tanh")
        return self._linear(prefix + "down", h)


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to halves, paired as x_i with x_{i + K/2}."""
    T, K = x.shape[-2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, K, 2).double() / K)[None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def adamw(model: TorchGPT, decayed: set[str], **options: Any) -> torch.optim.AdamW:
    """Return torch's AdamW with weight decay on the `decayed` names only."""
    decay = options.pop("weight_decay")
    groups = [
        {"params": [t for n, t in model.p.items() if n in decayed], "weight_decay": decay},
        {"params": [t for n, t in model.p.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)
