"""What a run is made of: the model, the training options and the presets, as frozen dataclasses
with checks beside the data.

Every field of `TrainConfig` is one flag of `python -m minillm.train` and one key of a `--config`
file; the sentence under it is the flag's help. A field left at None follows from the others:
`minillm.training.resolve` fills it in once the number of ranks and the vocabulary are known. `minillm.base.flags`
reads the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from minillm.base.errors import ConfigError


class Record:
    """Base of the configuration dataclasses: to and from plain values, as JSON and TOML hold
    them."""

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> Self:
        """The record holding `values`, the rest at their defaults.

        Raises ConfigError for unknown names and wrong types, naming `source`, where the values
        stand.
        """
        return cls(**checked_values(cls, values, source))


def checked_values(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`values` with every name and type checked against the fields of the dataclass `cls`. Raises
    ConfigError naming `source`."""
    hints = get_type_hints(cls)
    return {
        name: _typed(name, value, hints[known_name(name, hints, f"option in {source}")], source)
        for name, value in values.items()
    }


def known_name(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is one of `known`; else ConfigError with the nearest names, or all of them when
    none is near."""
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)}"
    raise ConfigError(f"unknown {what}: {name!r}; {hint}")


def _typed(name: str, value: Any, kind: Any, source: str) -> Any:
    options = get_args(kind)
    if get_origin(kind) is Literal:
        if value in options:
            return value
        wanted = f"one of {', '.join(options)}"
    elif options:  # X | None
        return None if value is None else _typed(name, value, options[0], source)
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    else:
        wanted = f"of type {kind.__name__}"
    raise ConfigError(f"{name} = {value!r} in {source} must be {wanted}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Architecture(Record):
    """The part of the model's shape that never follows from anything else."""

    layers: int = 4
    """Number of Transformer blocks."""
    heads: int = 4
    """Number of attention heads; each is dim / heads wide."""
    dim: int = 128
    """Width of the model."""
    context: int = 128
    """Length of the sequences, in tokens."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention and MLP."""
    mlp: Literal["gelu", "gelu-erf", "relu", "swiglu"] = "gelu"
    """Activation of the MLP: gelu by tanh as in GPT-2, gelu-erf exactly, relu, or swiglu as in
    Llama."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How the model knows positions: a learned table, a fixed table, or rotated queries and
    keys."""
    bias: bool = True
    """Biases in the linear layers and in layernorm."""
    dropout: float = 0.0
    """Share of activations dropped in training, in [0, 1)."""
    tied: bool = True
    """Use the token embedding as the output head too."""

    def __post_init__(self) -> None:
        _check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """The whole shape of a GPT: equal for every rank of a run, and kept in its checkpoints."""

    kv_heads: int
    """Number of key-value heads, each shared by heads / kv_heads query heads."""
    ffn_dim: int
    """Width inside the MLP."""
    vocab: int
    """Number of different tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_divides("heads", self.heads, "dim", self.dim)
        _check_divides("kv_heads", self.kv_heads, "heads", self.heads)
        even = self.position != "rotary" or self.head_width % 2 == 0
        _require(
            even,
            f"rotary positions turn pairs of channels, but dim / heads = {self.dim} / {self.heads} "
            f"= {self.head_width} is odd; "
            f"try --dim {self.heads * (self.head_width + 1)}",
        )

    @property
    def head_width(self) -> int:
        """Channels per attention head."""
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Architecture):
    """Every option of a training run. The defaults are the preset `nano` on text that every Python
    installation has."""

    preset: str = "nano"
    """Named set of defaults: nano, shakespeare-char, gpt2, gpt2-medium, gpt2-large, gpt2-xl or
    llama-tiny."""
    kv_heads: int | None = None
    """Number of key-value heads (grouped-query attention); left out: heads."""
    ffn_dim: int | None = None
    """Width inside the MLP; left out: 4 dim, for swiglu 8/3 dim rounded up to a multiple of 64."""
    vocab: int | None = None
    """Number of different tokens; left out: what the tokenizer has."""

    # What it reads
    data: str = "stdlib"
    """What to learn: stdlib (the source of Python's standard library), austen (a novel that comes
    along), shakespeare (fetched once), a text file, a folder of text files, or a .bin or .npy file
    of tokens."""
    tokenizer: str | None = None
    """How text becomes tokens: byte, char, or the path of a tokenizer.json; left out: byte for
    text, none for files of tokens."""

    # How it learns
    batch: int = 16
    """Sequences per step over all ranks."""
    steps: int = 1000
    """Optimizer steps in the whole run."""
    lr: float = 2e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr: float | None = None
    """Learning rate at the last step; left out: lr / 10."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr to min-lr after the warm-up."""
    warmup: int | None = None
    """Steps over which the learning rate rises from zero; left out: a tenth of steps, at most
    100."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings per unit of learning rate; never of norms and biases."""
    beta1: float = 0.9
    """AdamW's decay of the running mean of gradients."""
    beta2: float = 0.99
    """AdamW's decay of the running mean of squared gradients."""
    clip: float = 1.0
    """Longest allowed gradient, by its norm over all parameters; 0: no limit."""
    seed: int = 1337
    """Decides initial weights, dropout and the order of sequences."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of weights and activations; bfloat16 on a GPU, where gradients, masters and statistics
    stay float32."""

    # How it is spread over ranks
    dp: int | None = None
    """Data-parallel ranks, each with its share of the batch; left out: the ranks that tp and pp
    leave."""
    tp: int = 1
    """Tensor-parallel ranks, each with its share of every matrix."""
    pp: int = 1
    """Pipeline stages, each with its share of the layers."""
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """Order of the microbatches in the pipeline."""
    microbatch: int | None = None
    """Sequences per microbatch and data-parallel rank; left out: all at once, with a pipeline about
    2 pp microbatches."""
    stage_layers: str | None = None
    """Layers of each pipeline stage, as in 3,5; left out: the same number each."""
    sequence_parallel: bool = False
    """Shard norms and dropout along time over the tensor-parallel ranks."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass computes again instead of keeping it: selective (what norms and
    activations return: about 1 % more work), full (all but the input of each block: a third more
    work), none; auto: selective where that saves 16 MB or more."""
    bucket_mb: float = 4.0
    """Size in MB (10^6 bytes) of the pieces in which gradients are reduced while backward still
    runs."""
    node_shared: Literal["auto", "on", "off"] = "auto"
    """Let the data-parallel ranks of a node hold one copy of the weights and reduce gradients in
    shared memory: auto (where possible)."""
    kernels: str = "auto"
    """Implementation of the operations: auto (the fastest), numpy, c, cuda, or by operation as
    attention=cuda:v2,matmul=c:avx2."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where arrays live."""

    # What it writes
    out: str | None = None
    """Folder for metrics, configuration and checkpoints; left out: runs/PRESET."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    eval_every: int = 100
    """Steps between evaluations on held-out text; 0: only at the end."""
    eval_tokens: int = 16384
    """Held-out tokens per evaluation."""
    sample_tokens: int = 200
    """Tokens of the sample at the end; 0: none."""
    trace: bool = False
    """Write OUT/trace.json, a timeline of all ranks to open in Perfetto."""
    stop_after: int | None = None
    """End at this step, although the learning rate is planned for all steps."""
    check_every: int = 0
    """Steps between comparisons of the replicas' parameters; 0: never."""
    check_order: bool = False
    """Compare the order of communications between ranks, to find a mismatch; slow."""
    comm_timeout: float = 300.0
    """Seconds to wait for another rank before giving up."""


def _gpt2(layers: int, heads: int, dim: int, lr: float, microbatch: int) -> dict[str, Any]:
    """GPT-2 (Radford et al. 2019), its batch of 512 x 1024 tokens, and the learning rate of GPT-3
    at its size (Brown et al. 2020)."""
    model = dict(
        layers=layers, heads=heads, dim=dim, context=1024, vocab=50257, bias=True, tied=True
    )
    training = dict(batch=512, microbatch=microbatch, steps=600_000, lr=lr, warmup=2000, beta2=0.95)
    return model | training | dict(eval_every=1000, eval_tokens=1 << 20, save_every=1000)


def _shakespeare_char() -> dict[str, Any]:
    """nanoGPT's setting for a laptop: its config/train_shakespeare_char.py with the CPU flags of
    its README."""
    model = dict(layers=4, heads=4, dim=128, context=64, dropout=0.0, bias=False)
    training = dict(batch=12, steps=2000, lr=1e-3, min_lr=1e-4, warmup=100, beta2=0.99)
    return dict(data="shakespeare", tokenizer="char") | model | training | dict(eval_every=250)


# Preset -> the fields that it sets; the others keep their defaults, which are the preset nano.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {},
    "shakespeare-char": _shakespeare_char(),
    "gpt2": _gpt2(12, 12, 768, 6e-4, microbatch=4),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4, microbatch=2),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4, microbatch=1),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4, microbatch=1),
    "llama-tiny": dict(
        kv_heads=2, norm="rmsnorm", mlp="swiglu", position="rotary", bias=False, tied=False
    ),
}

# What may differ between a run and its continuation: where and how it computes and what it reports,
# never what it computes.
RESUMABLE = frozenset(
    {
        "dp",
        "tp",
        "pp",
        "schedule",
        "microbatch",
        "stage_layers",
        "sequence_parallel",
        "recompute",
        "bucket_mb",
        "node_shared",
        "kernels",
        "device",
    }
    | {"out", "save_every", "keep", "eval_every", "eval_tokens", "sample_tokens", "trace"}
    | {"stop_after", "check_every", "check_order", "comm_timeout"}
)

# Field -> (smallest value, whether that value itself is allowed); `_BELOW_ONE` are shares in [0,
# 1).
_AT_LEAST: dict[str, tuple[float, bool]] = {
    **dict.fromkeys(
        (
            "layers",
            "heads",
            "kv_heads",
            "dim",
            "ffn_dim",
            "context",
            "vocab",
            "batch",
            "microbatch",
            "steps",
        ),
        (1, True),
    ),
    **dict.fromkeys(("dp", "tp", "pp", "keep", "stop_after"), (1, True)),
    **dict.fromkeys(("lr", "bucket_mb", "comm_timeout"), (0, False)),
    **dict.fromkeys(
        ("min_lr", "warmup", "weight_decay", "beta1", "beta2", "clip", "seed", "dropout"), (0, True)
    ),
    **dict.fromkeys(
        ("save_every", "eval_every", "eval_tokens", "sample_tokens", "check_every"), (0, True)
    ),
}
_BELOW_ONE: Collection[str] = ("dropout", "beta1", "beta2")


def flag(name: str) -> str:
    """The flag of a field: kv_heads -> --kv-heads."""
    return "--" + name.replace("_", "-")


def _check_bounds(record: Record) -> None:
    """Each number by itself. Raises ConfigError; NaN and infinity never pass."""
    for name, value in record.to_dict().items():
        if value is None or name not in _AT_LEAST:
            continue
        bound, reached = _AT_LEAST[name]
        wanted = f"{'at least' if reached else 'more than'} {bound}" + (
            " and below 1" if name in _BELOW_ONE else ""
        )
        good = (
            math.isfinite(value)
            and (value >= bound if reached else value > bound)
            and (value < 1 or name not in _BELOW_ONE)
        )
        _require(good, f"{flag(name)} {value} must be {wanted}")


def _check_divides(part: str, size: int, whole: str, total: int) -> None:
    """Raises ConfigError with the sizes that would do unless `size` divides `total`."""
    if total % size:
        raise ConfigError(
            f"{flag(part)} {size} does not divide {flag(whole)} {total}; {flag(part)} can be "
            f"{some_divisors(total, near=size)}"
        )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending: 12 -> 1, 2, 3, 4, 6, 12."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def some_divisors(number: int, near: int, most: int = 6) -> str:
    """The divisors of `number` nearest to `near`, as text for an error: '2, 4 or 8'."""
    chosen = sorted(sorted(divisors(number), key=lambda d: abs(d - near))[:most])
    return or_list(chosen)


def or_list(options: Iterable[Any]) -> str:
    """'a, b or c'."""
    words = [str(option) for option in options]
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
