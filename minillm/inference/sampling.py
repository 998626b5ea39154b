"""Choice of the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minillm.base import rng
from minillm.base.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Sampling options, applied in this order.

    Temperature 0 takes the most likely token. `top_k` keeps the k most likely ones, 0 all of them.
    `top_p` keeps the smallest set of that total probability (Holtzman et al. 2020,
    arXiv:1904.09751). Raises ConfigError for options out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for words, right in (
            (f"--temperature {self.temperature:g} must be at least 0", self.temperature >= 0),
            (f"--top-k {self.top_k} must be at least 0", self.top_k >= 0),
            (f"--top-p {self.top_p:g} must be above 0 and at most 1", 0 < self.top_p <= 1),
        ):
            if not right:
                raise ConfigError(words)

    def choose(self, logits: np.ndarray, position: int) -> np.ndarray:
        """Choose one token id per row of logits [B, V]: int64 [B].

        The random number is a function of (seed, position, row).
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits)
        key = rng.key(self.seed, "sample", "token", position)
        uniform = rng.uniform(key, (len(logits),), (slice(0, len(logits)),), np.dtype(np.float64))
        cumulative = probabilities.cumsum(-1)
        return np.minimum(
            (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1), logits.shape[-1] - 1
        )

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the distribution [B, V] float64 that `choose` samples from."""
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, axis=-1, kind="stable")
        ranked = np.take_along_axis(scaled, order, -1)
        p = np.exp(ranked - ranked[:, :1])
        if self.top_k:
            p[:, self.top_k :] = 0
        p /= p.sum(-1, keepdims=True)
        p[(p.cumsum(-1) - p) >= self.top_p] = 0
        p /= p.sum(-1, keepdims=True)
        out = np.empty_like(p)
        np.put_along_axis(out, order, p, -1)
        return out
