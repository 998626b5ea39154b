"""Options and shape of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.record import Record, flag, option, some_divisors

# Width of swiglu's hidden layer is rounded up to this: whole vector registers, and room for
# tensor parallelism.
FFN_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape(Record):
    """Part of a model's shape that never follows from anything else."""

    layers: int = option(4, at_least=1)
    """Number of Transformer blocks."""
    heads: int = option(4, at_least=1)
    """Number of attention heads; each is dim / heads wide."""
    dim: int = option(128, at_least=1)
    """Width of the model."""
    context: int = option(128, at_least=1)
    """Length of the sequences, in tokens."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention and MLP."""
    mlp: Literal["gelu", "gelu-erf", "relu", "swiglu"] = "gelu"
    """Activation of the MLP: gelu by tanh as in GPT-2, gelu-erf exactly, relu, or swiglu as in
    Llama."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """Encoding of positions: a learned table, a fixed table, or rotated queries and keys."""
    bias: bool = True
    """Biases in the linear layers and in layernorm."""
    dropout: float = option(0.0, at_least=0, below=1, announced=True)
    """Share of activations dropped in training, in [0, 1)."""
    tied: bool = True
    """Use the token embedding as the output head as well."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelShape):
    """Whole shape of a GPT: equal for every rank of a run, and kept in its checkpoints."""

    kv_heads: int = option(at_least=1)
    """Number of key-value heads, each shared by heads / kv_heads query heads."""
    ffn_dim: int = option(at_least=1)
    """Width inside the MLP."""
    vocab: int = option(at_least=1)
    """Number of different tokens."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that do not fit together."""
        super().__post_init__()
        _check_divides("heads", self.heads, "dim", self.dim)
        _check_divides("kv_heads", self.kv_heads, "heads", self.heads)
        if self.position == "rotary" and self.head_width % 2:
            raise ConfigError(
                "rotary positions turn pairs of channels, but dim / heads = "
                f"{self.dim} / {self.heads} = {self.head_width} is odd; try --dim "
                f"{self.heads * (self.head_width + 1)}"
            )

    @property
    def head_width(self) -> int:
        """Channels per attention head."""
        return self.dim // self.heads

    @property
    def layer_products(self) -> int:
        """Multiply-adds per token of one layer's matrix products, without attention."""
        up = self.ffn_dim * (2 if self.mlp == "swiglu" else 1)
        projections = (self.heads + 2 * self.kv_heads) * self.head_width + self.dim
        return self.dim * (projections + up + self.ffn_dim)

    @property
    def training_flops(self) -> float:
        """FLOP to train on one token: 6 N + 12 L D T, with N weights in matrix products.

        The head counts, tables of tokens and positions do not. Causal attention is counted without
        its mask (Narayanan et al. 2021, appendix).
        """
        return float(self.layers * self._layer_flops + self._head_flops)

    @property
    def _layer_flops(self) -> int:
        return 6 * self.layer_products + 12 * self.dim * self.context

    @property
    def _head_flops(self) -> int:
        return 6 * self.vocab * self.dim

    def layer_costs(self) -> list[int]:
        """Return FLOP to train each layer on one token, as in `training_flops`.

        The first includes the embedding: 3 D additions, of the position and to both gradients. The
        last includes the head.
        """
        costs = [self._layer_flops] * self.layers
        costs[0] += 3 * self.dim
        costs[-1] += self._head_flops
        return costs


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ModelShape):
    """Model, as in `--layers 6 --heads 6 --dim 384 --context 256` (minillm/models/gpt.py)."""

    kv_heads: int | None = option(None, at_least=1)
    """Number of key-value heads (grouped-query attention); left out: heads."""
    ffn_dim: int | None = option(None, at_least=1)
    """Width inside the MLP; left out: 4 dim, for swiglu 8/3 dim rounded up to a multiple of 64."""
    vocab: int | None = option(None, at_least=1)
    """Number of different tokens; left out: what the tokenizer has."""

    def resolve(self, vocab: int | None = None) -> ModelConfig:
        """Return the shape for a tokenizer of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        if self.vocab is None and vocab is None:
            raise ConfigError("the number of tokens is not known; pass --vocab")
        if self.vocab is not None and vocab is not None and self.vocab < vocab:
            raise ConfigError(
                f"--vocab {self.vocab} is less than the {vocab} tokens of the data; pass --vocab "
                f"{vocab} or leave it out"
            )
        swiglu_dim = -(-8 * self.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
        follows = {
            "kv_heads": self.heads,
            "ffn_dim": swiglu_dim if self.mlp == "swiglu" else 4 * self.dim,
            "vocab": vocab,
        }
        given = {name: value for name, value in self.to_dict().items() if value is not None}
        return ModelConfig(**follows | given)


def _check_divides(part: str, size: int, whole: str, total: int) -> None:
    """Raise ConfigError with the sizes that fit unless `size` divides `total`."""
    if total % size:
        raise ConfigError(
            f"{flag(part)} {size} does not divide {flag(whole)} {total}; {flag(part)} can be "
            f"{some_divisors(total, near=size)}"
        )
