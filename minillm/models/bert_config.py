"""Options and shapes of an encoder: a BERT that is pre-trained, or a classifier made from one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import Record, option
from minillm.models.family import ShapeOptions
from minillm.models.gpt_config import ModelConfig
from minillm.models.sizes import check_divides, check_kernels, check_vocab

FINE_TUNING: dict[str, Any] = dict(
    context=128,
    dropout=0.1,
    batch=32,
    epochs=3.0,
    weight_decay=0.01,
    beta2=0.999,
    lr_schedule="linear-to-zero",
    eval_every=200,
    eval_tokens=1 << 30,
)
"""Options of a run on labelled examples, all but the rate."""
MASKED = 0.15  # share of positions that the head sees, for rates and costs


@dataclass(frozen=True, kw_only=True)
class EncoderShape(Record):
    """Part of an encoder's shape that never follows from anything else, whatever its heads are."""

    layers: int = option(4, at_least=1)
    """Number of Transformer blocks."""
    heads: int = option(4, at_least=1)
    """Number of attention heads."""
    dim: int = option(128, at_least=1)
    """Width of the model."""
    context: int = option(128, at_least=8)
    """Length of the longest sequences, in tokens, [CLS] and [SEP] included."""
    norm_eps: float = option(1e-12, above=0)
    """Number that norms add to a variance (RoBERTa: 1e-5)."""
    types: int = option(2, at_least=0)
    """Kinds of tokens with an embedding each: 2 tells the segments of a pair apart, RoBERTa has 1,
    DistilBERT none (0)."""
    position_offset: int = option(0, at_least=0)
    """Row of the position table for position 0 (RoBERTa: 2)."""
    dropout: float = option(0.0, at_least=0, below=1, announced=True)
    """Share of activations dropped in training, in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class BertShape(EncoderShape):
    """The same with the heads of pre-training."""

    objective: Literal["mlm", "mlm+nsp", "none"] = "mlm+nsp"
    """Losses, and the heads that they need: masked tokens (mlm), those and whether the second
    segment of a pair follows the first (mlm+nsp), or none, as in an encoder that embeds text."""
    pooler: bool = False
    """Keep a pooler of the first position (dense, tanh) where no loss needs it, as encoders of
    other libraries have it; mlm+nsp has one in any case."""


@dataclass(frozen=True, kw_only=True)
class BertConfig(BertShape):
    """Shape of an encoder: equal for every rank of a run, and kept in its checkpoints."""

    ffn_dim: int = option(at_least=1)
    """Width inside the MLP."""
    vocab: int = option(at_least=1)
    """Number of different tokens."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that do not fit together."""
        super().__post_init__()
        check_divides("heads", self.heads, "dim", self.dim)
        if self.pairs and self.types < 2:
            raise ConfigError(
                f"--types {self.types} cannot tell the two segments of a pair apart; use --types "
                "2, or --objective mlm"
            )

    @property
    def tied(self) -> bool:
        """True if the table of tokens is the head as well, so that there is a head."""
        return self.objective != "none"

    @property
    def pairs(self) -> bool:
        """True if the model judges pairs of segments."""
        return self.objective == "mlm+nsp"

    @property
    def pooled(self) -> bool:
        """True if the model has a pooler."""
        return self.pairs or self.pooler

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.context + self.position_offset

    @cached_property
    def core(self) -> ModelConfig:
        """The blocks as those of a GPT, for costs and memory."""
        names = ("layers", "heads", "dim", "context", "ffn_dim", "vocab")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ModelConfig(**sizes, kv_heads=self.heads, mlp="gelu-erf", norm_place="post")

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.heads

    @property
    def training_flops(self) -> float:
        """FLOP to train on one position, of which the head sees 15 %."""
        return float(sum(self.layer_costs()) - 3 * self.dim)

    def layer_costs(self) -> list[float]:
        """Return FLOP to train each layer on one position, embedding and head included."""
        each = 6.0 * (self.core.layer_products + self.core.attention_products(0))
        costs = [each] * self.layers
        costs[0] += 3 * self.dim
        if self.tied:
            costs[-1] += 6 * MASKED * self.dim * (self.dim + self.vocab)
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
            f"{plural(self.layers, 'layer')} of width {self.dim}, {plural(self.heads, 'head')}, "
            f"context {self.context}, {self.objective}"
        )


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(EncoderShape, ShapeOptions):
    """Options that encoders of all heads have."""

    ffn_dim: int | None = option(None, at_least=1)
    """Width inside the MLP; left out: 4 dim."""
    vocab: int | None = option(None, at_least=1)
    """Number of different tokens; left out: what the tokenizer has, and four special ones."""

    def given(self, vocab: int | None) -> dict[str, Any]:
        """Return the options, with the sizes that follow from them and from `vocab` tokens.

        Raises ConfigError where the number of tokens is unknown.
        """
        follows = {"ffn_dim": 4 * self.dim, "vocab": check_vocab(self.vocab, vocab)}
        return follows | {name: each for name, each in self.to_dict().items() if each is not None}

    def check_weights(self, had: Self) -> None:
        """Raise ConfigError if the table of positions would grow."""
        if self.context > had.context:
            raise ConfigError(
                f"--context {self.context} is longer than the {had.context} positions that the "
                f"old weights have learned; use --context {had.context} or less"
            )


@dataclass(frozen=True, kw_only=True)
class BertOptions(BertShape, EncoderOptions):
    """Encoder, as in `--layers 6 --heads 12 --dim 384` (minillm/models/bert.py)."""

    FREE: ClassVar[tuple[str, ...]] = ("context", "dropout", "objective", "pooler")

    def resolve(self, vocab: int | None = None) -> BertConfig:
        """Return the shape for data of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        given = self.given(vocab)
        given["pooler"] = self.pooler and self.objective != "mlm+nsp"  # which has its own
        return BertConfig(**given)
