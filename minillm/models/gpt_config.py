"""Options, shape and presets of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import Record, option
from minillm.models.family import ShapeOptions
from minillm.models.sizes import check_divides, check_kernels, check_vocab

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
        check_divides("heads", self.heads, "dim", self.dim)
        check_divides("kv_heads", self.kv_heads, "heads", self.heads)
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

    def cut_over_tp(self, sequence_parallel: bool) -> dict[str, int]:
        """Return option -> size that tensor parallelism divides."""
        cut = {"heads": self.heads, "kv_heads": self.kv_heads, "ffn_dim": self.ffn_dim}
        return cut | ({"context": self.context} if sequence_parallel else {})

    def check_device(self, device: str) -> None:
        """Raise ConfigError if the device has no kernels for these sizes."""
        check_kernels(device, self.dim, self.heads)

    def describe(self) -> str:
        """Return the sizes in words."""
        return (
            f"{plural(self.layers, 'layer')} of width {self.dim}, {plural(self.heads, 'head')}, "
            f"context {self.context}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ModelShape, ShapeOptions):
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
        swiglu_dim = -(-8 * self.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
        follows = {
            "kv_heads": self.heads,
            "ffn_dim": swiglu_dim if self.mlp == "swiglu" else 4 * self.dim,
            "vocab": check_vocab(self.vocab, vocab),
        }
        given = {name: value for name, value in self.to_dict().items() if value is not None}
        return ModelConfig(**follows | given)

    def check_weights(self, had: ModelOptions) -> None:
        """Raise ConfigError if a table of positions would grow; other positions have none."""
        if self.position == "learned" and self.context > had.context:
            raise ConfigError(
                f"--context {self.context} is longer than the {had.context} positions that the "
                f"weights of --init-from have learned; use --context {had.context} or less. A "
                "model trained with --position rotary can be continued at a longer context"
            )


def _gpt2(layers: int, heads: int, dim: int, lr: float, microbatch: int) -> dict[str, Any]:
    """Return GPT-2 (Radford et al. 2019), with its batch of 512 x 1024 tokens.

    The learning rate is that of GPT-3 at the same size (Brown et al. 2020).
    """
    model = dict(
        layers=layers, heads=heads, dim=dim, context=1024, vocab=50257, bias=True, tied=True
    )
    training = dict(batch=512, microbatch=microbatch, steps=600_000, lr=lr, warmup=2000, beta2=0.95)
    return model | training | dict(eval_every=1000, eval_tokens=1 << 20)


def _shakespeare_char() -> dict[str, Any]:
    """Return nanoGPT's setting for a laptop.

    It is config/train_shakespeare_char.py with the CPU flags of the README.
    """
    model = dict(layers=4, heads=4, dim=128, context=64, dropout=0.0, bias=False)
    training = dict(batch=12, steps=2000, lr=1e-3, min_lr=1e-4, warmup=100, beta2=0.99)
    return dict(data="shakespeare", tokenizer="char") | model | training | dict(eval_every=250)


def _nano() -> dict[str, Any]:
    """Return a run of two to three minutes on two cores with AVX2, whose sample reads as English.

    A byte model with rotary positions learns at twice the learning rate of a position table.
    """
    training = dict(steps=2400, lr=4e-3, eval_every=200, sample_tokens=400)
    return dict(data="austen", position="rotary") | training


# Preset -> the options that it sets. The others keep their defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": _nano(),
    "shakespeare-char": _shakespeare_char(),
    "gpt2": _gpt2(12, 12, 768, 6e-4, microbatch=4),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4, microbatch=2),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4, microbatch=1),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4, microbatch=1),
    "llama-tiny": _nano() | dict(kv_heads=2, norm="rmsnorm", mlp="swiglu", bias=False, tied=False),
}
