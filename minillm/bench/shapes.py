"""The sizes that benchmarks are run at."""

from __future__ import annotations

from typing import NamedTuple

from minillm.models.gpt_config import ModelOptions


class Shape(NamedTuple):
    """A GPT-2 and its batch."""

    layers: int
    heads: int
    dim: int
    context: int
    batch: int
    vocab: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.context * self.batch

    def step_flops(self) -> float:
        """Return the FLOP of a training step."""
        sizes = {name: getattr(self, name) for name in ("layers", "heads", "dim", "context")}
        return self.tokens * ModelOptions(**sizes, vocab=self.vocab).resolve().training_flops


CONFIGS = {
    "c1": Shape(4, 4, 128, 64, 12, 65),
    "c2": Shape(6, 6, 384, 256, 8, 65),
    "c3": Shape(4, 8, 512, 256, 4, 50304),
    "g2": Shape(12, 12, 768, 256, 2, 50304),
}
"""c1: nanoGPT's CPU setting; c2: a 10M model; c3: a small model with GPT-2's vocabulary; g2: GPT-2
124M."""
