"""Options, shape and presets of an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.record import option
from minillm.models.family import ShapeOptions
from minillm.models.sizes import check_divides, check_kernels, check_vocab


@dataclass(frozen=True, kw_only=True)
class Seq2SeqOptions(ShapeOptions):
    """Encoder-decoder, as in `--encoder-layers 3 --decoder-layers 3 --dim 256`."""

    encoder_layers: int = option(2, at_least=1)
    """Layers that read the source."""
    decoder_layers: int = option(2, at_least=1)
    """Layers that write the target."""
    heads: int = option(4, at_least=1)
    """Number of attention heads."""
    dim: int = option(128, at_least=1)
    """Width of the model."""
    ffn_dim: int | None = option(None, at_least=1)
    """Width inside the MLP; left out: 4 dim."""
    context: int = option(64, at_least=2)
    """Most tokens of a source or a target, its end included. Longer pairs are left out."""
    norm_place: Literal["pre", "post"] = "pre"
    """Place of norms: before each half and behind each stack (pre), or behind the residual sums
    (post, as in the paper)."""
    norm_eps: float = option(1e-5, above=0)
    """Number that norms add to a variance."""
    mlp: Literal["relu", "gelu", "gelu-erf", "silu"] = "relu"
    """Activation of the MLP."""
    position: Literal["sinusoidal", "halves", "learned"] = "sinusoidal"
    """Encoding of positions: sines and cosines in turns as in the paper, all sines before all
    cosines as in Marian (halves), or a learned table for each side."""
    dropout: float = option(0.0, at_least=0, below=1, announced=True)
    """Share of activations dropped in training, in [0, 1)."""
    label_smoothing: float = option(0.0, at_least=0, below=1, announced=True)
    """Share of the training loss that is the mean of -log p over all tokens, as in PyTorch;
    held-out losses have none."""
    tied: bool = True
    """Use one matrix for the embeddings of both sides and the output head."""
    head_bias: bool = False
    """Add a bias to the logits, as Marian does."""
    vocab: int | None = option(None, at_least=1)
    """Number of different tokens; left out: those of the tokenizer, and one that ends sequences."""

    def resolve(self, vocab: int | None = None) -> Seq2SeqConfig:
        """Return the shape. Raises ConfigError for sizes that do not fit together."""
        check_divides("heads", self.heads, "dim", self.dim)
        follows = {
            "ffn_dim": self.ffn_dim or 4 * self.dim,
            "vocab": check_vocab(self.vocab, vocab),
        }
        return Seq2SeqConfig(**self.to_dict() | follows)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Shape of an encoder-decoder: equal for every rank of a run."""

    encoder_layers: int
    decoder_layers: int
    heads: int
    dim: int
    ffn_dim: int
    context: int
    norm_place: str
    norm_eps: float
    mlp: str
    position: str
    dropout: float
    label_smoothing: float
    tied: bool
    head_bias: bool
    vocab: int

    @property
    def layers(self) -> int:
        """Layers of the encoder and the decoder."""
        return self.encoder_layers + self.decoder_layers

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.heads

    @property
    def training_flops(self) -> float:
        """FLOP to train on a position of the source and one of the target, without masks."""
        return float(sum(self.layer_costs()))

    def layer_costs(self) -> list[float]:
        """Return FLOP to train each layer on a position of the source or of the target.

        Attention to itself has 4 D^2 weights, attention to the memory 2 D^2 per position of each
        side, each 2 D multiply-adds per key; the MLP has 2 D F weights. The last layer includes the
        head.
        """
        own = 4 * self.dim**2 + 2 * self.dim * self.context
        mlp = 2 * self.dim * self.ffn_dim
        costs = [6.0 * (own + mlp)] * self.encoder_layers
        costs += [6.0 * (2 * own + mlp)] * self.decoder_layers
        costs[-1] += 6.0 * self.vocab * self.dim
        return costs

    def cut_over_tp(self, sequence_parallel: bool) -> dict[str, int]:
        """Return option -> size that tensor parallelism divides."""
        cut = {"heads": self.heads, "ffn_dim": self.ffn_dim}
        return cut | ({"context": self.context} if sequence_parallel else {})

    def check_device(self, device: str) -> None:
        """Raise ConfigError if the device has no kernels for these sizes."""
        check_kernels(device, self.dim, self.heads)

    def describe(self) -> str:
        """Return the sizes in words."""
        return (
            f"{self.encoder_layers} + {self.decoder_layers} layers of width {self.dim}, "
            f"{self.heads} heads, context {self.context}"
        )


PRESETS = {
    # Sub-words translate whole messages after 1500 steps; characters copy letters by then.
    "translate": dict(
        tokenizer="bpe:2000",
        steps=1500,
        batch=64,
        lr=2e-3,
        beta2=0.98,
        label_smoothing=0.1,
        eval_every=200,
    ),
    # The shape of a tutorial's model of Multi30k (--source train.de --target train.en).
    "multi30k": dict(
        encoder_layers=3,
        decoder_layers=3,
        heads=8,
        dim=256,
        ffn_dim=512,
        context=128,
        dropout=0.1,
        label_smoothing=0.1,
        batch=64,
        tokenizer="bpe:8000",
        steps=2270,
        warmup=800,
        lr=1.1e-3,
        lr_schedule="noam",
        beta2=0.98,
        weight_decay=0.0,
        eval_every=454,
        eval_tokens=32768,  # all of the 1,014 validation pairs
    ),
}
