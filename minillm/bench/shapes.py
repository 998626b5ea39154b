"""The sizes that benchmarks are run at."""

from __future__ import annotations

from typing import NamedTuple


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
        """Return 6 N tokens + 12 L D T tokens, the FLOP of a training step.

        N excludes the position table. Causal attention is counted without its mask (Narayanan et
        al. 2021, appendix).
        """
        matrices = 12 * self.layers * self.dim**2 + self.vocab * self.dim
        return self.tokens * (6 * matrices + 12 * self.layers * self.dim * self.context)


CONFIGS = {
    "c1": Shape(4, 4, 128, 64, 12, 65),
    "c2": Shape(6, 6, 384, 256, 8, 65),
    "c3": Shape(4, 8, 512, 256, 4, 50304),
    "g2": Shape(12, 12, 768, 256, 2, 50304),
}
"""c1: nanoGPT's CPU setting; c2: a 10M model; c3: a small model with GPT-2's vocabulary; g2: GPT-2
124M."""
