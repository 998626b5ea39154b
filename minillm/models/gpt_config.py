"""Options and shape of a GPT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import Record, flag, option
from minillm.models.family import ShapeOptions
from minillm.models.sizes import check_divides, check_kernels, check_vocab
from minillm.nn.mlp import GATED
from minillm.nn.position import Rotary, RotaryScaling, rotary

# Width of a gated hidden layer is rounded up to this: whole vector registers, and room for
# tensor parallelism.
FFN_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape(Record):
    """Part of a model's shape that never follows from anything else."""

    layers: int = option(4, at_least=1)
    """Number of Transformer blocks."""
    heads: int = option(4, at_least=1)
    """Number of attention heads."""
    dim: int = option(128, at_least=1)
    """Width of the model."""
    context: int = option(128, at_least=1)
    """Length of the sequences, in tokens."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation of each block and before the head."""
    norm_place: Literal["pre", "post", "output", "both"] = "pre"
    """Place of a block's norms: before attention and MLP (pre), behind the residual sums (post, as
    in the first Transformer), on the outputs of attention and MLP (output, as in OLMo 2), or before
    them and on their outputs (both, as in Gemma 2)."""
    norm_eps: float = option(1e-5, above=0)
    """Number that norms add to a variance or a mean square."""
    mlp: Literal["gelu", "gelu-erf", "relu", "relu2", "silu", "swiglu", "geglu"] = "gelu"
    """Activation of the MLP: gelu by tanh as in GPT-2, gelu-erf exactly, relu, relu2 (its square),
    silu, swiglu as in Llama, or geglu as in Gemma."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """Encoding of positions: a learned table, a fixed table, or rotated queries and keys."""
    rope_base: float = option(10000.0, above=1)
    """Base of the angles of rotary positions (theta)."""
    rope_local_base: float | None = option(None, above=1)
    """Base in the layers with a window, which are then not scaled (Gemma 3); left out: as in all
    layers."""
    rope_share: float = option(1.0, above=0)
    """Share of each head's channels that rotary positions turn, at most 1; the first ones."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Extension of rotary positions to longer contexts: all angles divided by a factor (linear), or
    those alone that turn rarely within the original context (llama3, yarn)."""
    rope_factor: float = option(1.0, at_least=1)
    """Factor by which a scaling of rotary positions divides angles."""
    rope_original: int | None = option(None, at_least=1)
    """Context of the model before its scaling by llama3 or yarn, in tokens."""
    rope_low: float | None = option(None, above=0)
    """Turns within the original context up to which an angle is divided whole; left out: 1."""
    rope_high: float | None = option(None, above=0)
    """Turns within the original context from which on an angle stays; left out: 4 for llama3, 32
    for yarn."""
    rope_attention: float | None = option(None, above=0)
    """Factor on rotated queries and keys; left out: 0.1 ln(factor) + 1 for yarn, else 1."""
    bias: Literal["none", "all", "qkv"] = option("all", switch=("none", "all"))
    """Biases: none, all (linear layers and layernorm, as in GPT-2), or on queries, keys and values
    alone (qkv, as in Qwen2)."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """RMS norm of queries and keys before they are rotated: of each head (head, as in Qwen3), or
    over all heads (width, as in OLMo 2)."""
    window: int = option(0, at_least=0)
    """Positions that a query sees, itself included (sliding window attention); 0: all before it."""
    full_every: int = option(0, at_least=0)
    """Every n-th layer sees all positions in spite of the window (Gemma 2: 2, Gemma 3: 6); 0: none
    does."""
    attention_cap: float = option(0.0, at_least=0)
    """Bound on the scores of attention: cap tanh(scores / cap), as in Gemma 2; 0: none."""
    attention_scalar: float | None = option(None, above=0)
    """Number whose square root divides the products of queries and keys (query_pre_attn_scalar of
    Gemma 2); left out: the width of a head."""
    embedding_scale: float = option(1.0, above=0)
    """Factor on the token embeddings (Gemma: the square root of dim)."""
    logit_cap: float = option(0.0, at_least=0)
    """Bound on the logits: cap tanh(logits / cap), as in Gemma 2; 0: none."""
    dropout: float = option(0.0, at_least=0, below=1, announced=True)
    """Share of activations dropped in training, in [0, 1)."""
    tied: bool = True
    """Use the token embedding as the output head as well."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelShape):
    """Shape of a GPT: equal for every rank of a run, and kept in its checkpoints."""

    kv_heads: int = option(at_least=1)
    """Number of key-value heads, each shared by heads / kv_heads query heads."""
    head_width: int = option(0, at_least=0)
    """Channels of an attention head; 0, replaced at once: dim / heads."""
    ffn_dim: int = option(at_least=1)
    """Width inside the MLP."""
    vocab: int = option(at_least=1)
    """Number of different tokens."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that do not fit together."""
        super().__post_init__()
        if not self.head_width:
            check_divides("heads", self.heads, "dim", self.dim)
            object.__setattr__(self, "head_width", self.dim // self.heads)
        check_divides("kv_heads", self.kv_heads, "heads", self.heads)
        if self.position == "rotary":
            self._check_rotary()
        elif self.rope_scaling != "none":
            raise ConfigError(
                f"--rope-scaling {self.rope_scaling} is for rotary positions, not --position "
                f"{self.position}; use --position rotary"
            )
        if self.full_every and not self.window:
            raise ConfigError(
                f"--full-every {self.full_every} names the layers without a window, but there is "
                "none; pass --window"
            )

    def _check_rotary(self) -> None:
        width = self.head_width
        if self.rope_share > 1 or self._turned % 2 or not self._turned:
            if self.rope_share == 1:
                raise ConfigError(
                    f"rotary positions turn pairs of channels, but a head's width {width} is odd "
                    f"(dim / heads = {self.dim} / {self.heads}); try --head-width {width + 1}"
                )
            raise ConfigError(
                f"--rope-share {self.rope_share:g} of a head's {width} channels must be an even "
                f"number from 2 to {width}, and is {self._turned}; try --rope-share 0.5 or 1"
            )
        if (self.rope_scaling != "none") != (self.rope_factor > 1):
            raise ConfigError(
                f"--rope-scaling {self.rope_scaling} with --rope-factor {self.rope_factor:g}: "
                "scaling needs a factor above 1, and a factor needs --rope-scaling linear, llama3 "
                "or yarn"
            )
        unused = [
            f"{flag(name)} {getattr(self, name):g}"
            for name in ("rope_original", "rope_low", "rope_high", "rope_attention")
            if getattr(self, name) is not None and self.rope_scaling == "none"
        ]
        if unused:
            raise ConfigError(f"{', '.join(unused)} without --rope-scaling changes nothing")
        if self.rope_scaling in ("llama3", "yarn"):
            if self.rope_original is None:
                raise ConfigError(
                    f"--rope-scaling {self.rope_scaling} counts turns within the context before "
                    "scaling; pass --rope-original"
                )
            if self._scaling.low >= self._scaling.high:
                raise ConfigError(
                    f"--rope-low {self._scaling.low:g} must be below --rope-high "
                    f"{self._scaling.high:g}"
                )

    @property
    def _turned(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.head_width * self.rope_share)

    @property
    def _scaling(self) -> RotaryScaling:
        kind, yarn = self.rope_scaling, self.rope_scaling == "yarn"
        return RotaryScaling(
            kind=kind,
            factor=self.rope_factor,
            original=self.rope_original or 0,
            low=self.rope_low or 1.0,
            high=self.rope_high or (32.0 if yarn else 4.0),
            amplitude=self.rope_attention
            or (0.1 * math.log(self.rope_factor) + 1 if yarn else 1.0),
        )

    def rotary_of(self, layer: int) -> Rotary | None:
        """Return the rotation of a layer's queries and keys, None without rotary positions."""
        if self.position != "rotary":
            return None
        if self.rope_local_base is not None and self.window_of(layer):
            return rotary(self._turned, self.rope_local_base)
        return rotary(self._turned, self.rope_base, self._scaling)

    def window_of(self, layer: int) -> int:
        """Return the positions that a query of a layer sees; 0: all before it."""
        full = self.full_every and (layer + 1) % self.full_every == 0
        return 0 if full else self.window

    @property
    def hidden_layers(self) -> int:
        """Arrays of width `ffn_dim` that the MLP computes in its first product: 1, gated 2."""
        return 2 if self.mlp in GATED else 1

    @property
    def attention_dim(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def qkv_dim(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def layer_products(self) -> int:
        """Multiply-adds per token of one layer's matrix products, without attention."""
        hidden = self.ffn_dim * (self.hidden_layers + 1)
        return self.dim * (self.qkv_dim + self.attention_dim + hidden)

    def attention_products(self, layer: int) -> int:
        """Multiply-adds per token of a layer's attention, without its causal mask.

        A query meets the keys of the context, or of its window.
        """
        return 2 * self.attention_dim * min(self.context, self.window_of(layer) or self.context)

    @property
    def training_flops(self) -> float:
        """FLOP to train on one token: 6 N + 12 H K T a layer, with N weights in matrix products.

        The head counts, tables of tokens and positions do not. Causal attention is counted without
        its mask (Narayanan et al. 2021, appendix). In a layer with a window, T is the window.
        """
        return float(sum(map(self._layer_flops, range(self.layers))) + self._head_flops)

    def _layer_flops(self, layer: int) -> int:
        return 6 * (self.layer_products + self.attention_products(layer))

    @property
    def _head_flops(self) -> int:
        return 6 * self.vocab * self.dim

    def layer_costs(self) -> list[int]:
        """Return FLOP to train each layer on one token, as in `training_flops`.

        The first includes the embedding: 3 D additions, of the position and to both gradients. The
        last includes the head.
        """
        costs = [self._layer_flops(layer) for layer in range(self.layers)]
        costs[0] += 3 * self.dim
        costs[-1] += self._head_flops
        return costs

    def cut_over_tp(self, sequence_parallel: bool) -> dict[str, int]:
        """Return option -> size that tensor parallelism divides; key-value heads are shared."""
        cut = {"heads": self.heads, "ffn_dim": self.ffn_dim}
        return cut | ({"context": self.context} if sequence_parallel else {})

    def check_device(self, device: str) -> None:
        """Raise ConfigError if the device has no kernels for these sizes."""
        check_kernels(device, self.dim, self.heads, self.head_width)

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
    head_width: int | None = option(None, at_least=1)
    """Channels of an attention head; left out: dim / heads."""
    ffn_dim: int | None = option(None, at_least=1)
    """Width inside the MLP; left out: 4 dim, for swiglu and geglu 8/3 dim rounded up to a multiple
    of 64."""
    vocab: int | None = option(None, at_least=1)
    """Number of different tokens; left out: what the tokenizer has."""

    def resolve(self, vocab: int | None = None) -> ModelConfig:
        """Return the shape for a tokenizer of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        gated_dim = -(-8 * self.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
        follows = {
            "kv_heads": self.heads,
            "ffn_dim": gated_dim if self.mlp in GATED else 4 * self.dim,
            "vocab": check_vocab(self.vocab, vocab),
        }
        given = {name: value for name, value in self.to_dict().items() if value is not None}
        return ModelConfig(**follows | given)

    def check_weights(self, had: ModelOptions) -> None:
        """Raise ConfigError if a table of positions would grow; other positions have none."""
        if self.position == "learned" and self.context > had.context:
            raise ConfigError(
                f"--context {self.context} is longer than the {had.context} positions that the "
                f"old weights have learned; use --context {had.context} or less. A "
                "model trained with --position rotary can be continued at a longer context"
            )
