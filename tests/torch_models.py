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
    """Functional model over a dict of named tensors: every switch of a GPT but rotary scaling."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.p = {
            name: torch.tensor(np.ascontiguousarray(value), requires_grad=True)
            for name, value in weights.items()
        }

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, T, V] of ids [B, T]."""
        c, p = self.config, self.p
        x = F.embedding(ids, p["embedding.weight"]) * c.embedding_scale
        if c.position == "learned":
            x = x + p["positions"][: ids.shape[1]]
        for layer in range(c.layers):
            window = c.window if not c.full_every or (layer + 1) % c.full_every else 0
            x = self._half(layer, 1, x, lambda name, y, w=window: self._attention(name, y, w))
            x = self._half(layer, 2, x, self._mlp)
        head = p["embedding.weight"] if c.tied else p["head"]
        logits = (x if c.norm_place == "post" else self._norm("norm.", x)) @ head.T
        return c.logit_cap * torch.tanh(logits / c.logit_cap) if c.logit_cap else logits

    def _half(self, layer: int, half: int, x: torch.Tensor, run: Any) -> torch.Tensor:
        place, at = self.config.norm_place, f"blocks.{layer}."
        name = at + ("attention." if half == 1 else "mlp.")
        if place == "post":
            return self._norm(f"{at}norm{half}.", x + run(name, x))
        y = run(name, x if place == "output" else self._norm(f"{at}norm{half}.", x))
        return x + (y if place == "pre" else self._norm(f"{at}out_norm{half}.", y))

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.p[name + ".weight"], self.p.get(name + ".bias"))

    def _norm(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.p[prefix + "weight"]
        if self.config.norm == "layernorm":
            bias, eps = self.p.get(prefix + "bias"), self.config.norm_eps
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _attention(self, prefix: str, x: torch.Tensor, window: int) -> torch.Tensor:
        c = self.config
        B, T, _ = x.shape
        K = c.head_width
        q, k, v = self._linear(prefix + "qkv", x).split(
            [c.heads * K, c.kv_heads * K, c.kv_heads * K], -1
        )
        if c.qk_norm == "width":
            q, k = (
                F.rms_norm(t, t.shape[-1:], self.p[f"{prefix}qk_norm.{name}"], c.norm_eps)
                for t, name in ((q, "queries"), (k, "keys"))
            )
        q, k, v = (t.view(B, T, -1, K).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = (
                F.rms_norm(t, (K,), self.p[f"{prefix}qk_norm.{name}"], c.norm_eps)
                for t, name in ((q, "queries"), (k, "keys"))
            )
        if c.position == "rotary":
            local = c.rope_local_base is not None and window
            base, turned = c.rope_local_base if local else c.rope_base, int(K * c.rope_share)
            q, k = (
                torch.cat([_rotate(t[..., :turned], base), t[..., turned:]], -1) for t in (q, k)
            )
        ages = torch.arange(T)[:, None] - torch.arange(T)
        seen = (ages >= 0) & (ages < (window or T))
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
        scores = q @ k.mT / (c.attention_scalar or K) ** 0.5
        if c.attention_cap:
            scores = c.attention_cap * torch.tanh(scores / c.attention_cap)
        y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self._linear(prefix + "out", y.transpose(1, 2).reshape(B, T, -1))

    def _mlp(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        h = self._linear(prefix + "up", x)
        kind = self.config.mlp
        if kind.endswith("glu"):
            gate, up = h.chunk(2, -1)
            h = (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up
        else:
            h = ACTIVATIONS[kind](h)
        return self._linear(prefix + "down", h)


ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu-erf": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


def _rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Apply rotary positions to halves, paired as x_i with x_{i + K/2}."""
    T, K = x.shape[-2:]
    angle = torch.arange(T)[:, None] * base ** (-torch.arange(0, K, 2).double() / K)[None, :]
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
