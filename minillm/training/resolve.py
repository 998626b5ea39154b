"""From the options of a run to its resolved configuration: every size filled in, every division
checked, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minillm.base.arrays import float_dtype
from minillm.base.errors import ConfigError
from minillm.kernels.attention.cuda import HEAD_WIDTHS
from minillm.kernels.grids import WIDEST_ROW as WIDEST_NORM
from minillm.training.config import (
    RESUMABLE,
    ModelConfig,
    TrainConfig,
    divisors,
    flag,
    or_list,
    some_divisors,
)

# swiglu's width is rounded up to this: whole vector registers, and room for tensor parallelism
FFN_MULTIPLE = 64
RECOMPUTE_BYTES = (
    16 << 20
)  # what selective recomputation must save of a rank's activations to be worth its time
_MOST_LAYOUTS = 12  # how many alternatives an error lists


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """One run on `num_ranks` ranks, with nothing left open: `asked` as it was given, `train` with
    every field filled in."""

    asked: TrainConfig
    train: TrainConfig
    model: ModelConfig
    num_ranks: int
    dp: int
    tp: int
    pp: int
    microbatch: int
    """Sequences per microbatch on one rank."""
    num_microbatches: int
    """Microbatches per step on one rank."""
    stage_layers: tuple[int, ...]
    """Layers of each pipeline stage, in order."""
    warmup: int
    """Steps."""
    min_lr: float
    """Learning rate at the last step."""
    out: str
    """The folder to write to."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.train.batch * self.model.context

    def saved_values(self) -> dict[str, Any]:
        """What a checkpoint keeps: the resolved values, but what may change on resume as it was
        asked, to follow from the ranks then. Where this run was told to stop early is its own
        affair."""
        asked = self.asked.to_dict() | {"stop_after": None}
        return {
            name: asked[name] if name in RESUMABLE else value
            for name, value in self.train.to_dict().items()
        }


def resolve(config: TrainConfig, num_ranks: int, vocab: int | None = None) -> ResolvedConfig:
    """Fill in what `config` leaves open, for `num_ranks` ranks and a tokenizer (or token file) of
    `vocab` tokens.

    Raises ConfigError for sizes that do not divide, for a layout that does not use all ranks, and
    when neither `config` nor the tokenizer says how many tokens there are.
    """
    model = resolve_model(config, vocab)
    _check_device(config, model)
    dp = _data_parallel(config, model, num_ranks)
    _check_tensor_parallel(config, model)
    stage_layers = _stage_layers(config)
    microbatch = _microbatch(config, dp)
    warmup = min(100, config.steps // 10) if config.warmup is None else config.warmup
    if warmup > config.steps:
        raise ConfigError(
            f"--warmup {warmup} is longer than --steps {config.steps}; try --warmup "
            f"{config.steps // 10}"
        )
    min_lr = config.lr / 10 if config.min_lr is None else config.min_lr
    if min_lr > config.lr:
        raise ConfigError(f"--min-lr {min_lr} is above --lr {config.lr}; leave it out for lr / 10")
    out = config.out or f"runs/{config.preset}"
    found: dict[str, Any] = dict(
        dp=dp, microbatch=microbatch, warmup=warmup, min_lr=min_lr, out=out
    )
    recompute = _recompute(config, model, microbatch * max(stage_layers))
    sizes: dict[str, Any] = dict(
        kv_heads=model.kv_heads,
        ffn_dim=model.ffn_dim,
        vocab=model.vocab,
        stage_layers=_words(stage_layers),
    )
    return ResolvedConfig(
        asked=config,
        train=dataclasses.replace(config, recompute=recompute, **found, **sizes),
        model=model,
        num_ranks=num_ranks,
        tp=config.tp,
        pp=config.pp,
        num_microbatches=config.batch // (dp * microbatch),
        stage_layers=stage_layers,
        **found,
    )


def resolve_model(config: TrainConfig, vocab: int | None = None) -> ModelConfig:
    """The model that `config` describes, for a tokenizer of `vocab` tokens. Raises ConfigError for
    sizes that do not fit together."""
    if config.vocab is None and vocab is None:
        raise ConfigError("the number of tokens is not known; pass --vocab")
    if config.vocab is not None and vocab is not None and config.vocab < vocab:
        raise ConfigError(
            f"--vocab {config.vocab} is less than the {vocab} tokens of the data; pass --vocab "
            f"{vocab} or leave it out"
        )
    swiglu_dim = -(-8 * config.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
    shape = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    shape["kv_heads"] = config.heads if config.kv_heads is None else config.kv_heads
    shape["ffn_dim"] = config.ffn_dim or (swiglu_dim if config.mlp == "swiglu" else 4 * config.dim)
    shape["vocab"] = config.vocab or vocab
    return ModelConfig(**shape)


def valid_layouts(
    config: TrainConfig, model: ModelConfig, num_ranks: int
) -> list[tuple[int, int, int]]:
    """Every (dp, tp, pp) with dp * tp * pp = num_ranks that this model and batch can be cut into,
    data parallelism first."""
    tps = [
        tp
        for tp in divisors(num_ranks)
        if all(total % tp == 0 for total in _cut_over_tp(config, model).values())
    ]
    layouts = [
        (num_ranks // (tp * pp), tp, pp)
        for tp in tps
        for pp in divisors(num_ranks // tp)
        if pp <= model.layers
    ]
    fits = [
        layout for layout in layouts if config.batch % (layout[0] * (config.microbatch or 1)) == 0
    ]
    return sorted(fits, key=lambda layout: (layout[2], layout[1]))


def check_resume(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError unless `config` continues the run whose checkpoint holds the values
    `saved`."""
    before, now = TrainConfig.from_dict(saved, "the checkpoint").to_dict(), config.to_dict()
    changed = [
        f"{flag(name)} {now[name]} (was {before[name]})"
        for name in before
        if name not in RESUMABLE and before[name] != now[name]
    ]
    if changed:
        may = ", ".join(flag(name) for name in before if name in RESUMABLE)
        raise ConfigError(
            f"a resumed run cannot change {', '.join(changed)}; leave it out, or start a new run. "
            f"These may change: {may}"
        )


def even_split(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` whole numbers as equal as possible, the larger ones in the middle: the
    outer stages also hold the vocabulary."""
    base, extra = divmod(total, parts)
    first = (parts - extra) // 2
    return tuple(base + (first <= part < first + extra) for part in range(parts))


def _words(sizes: Iterable[int]) -> str:
    """(3, 5) -> 3,5 as on the command line."""
    return ",".join(map(str, sizes))


def _cut_over_tp(config: TrainConfig, model: ModelConfig) -> dict[str, int]:
    """Field name -> size that tensor parallelism divides. The vocabulary is padded instead."""
    cut = {"heads": model.heads, "kv_heads": model.kv_heads, "ffn_dim": model.ffn_dim}
    return cut | ({"context": model.context} if config.sequence_parallel else {})


def _data_parallel(config: TrainConfig, model: ModelConfig, num_ranks: int) -> int:
    """The data-parallel size, asked for or what tp and pp leave."""
    others = config.tp * config.pp
    dp = max(num_ranks // others, 1) if config.dp is None else config.dp
    if dp * others != num_ranks:
        ranks = f"{num_ranks} {'rank runs' if num_ranks == 1 else 'ranks run'}"
        way_out = f"use mpirun -n {dp * others}, or {_other_layouts(config, model, num_ranks)}"
        raise ConfigError(
            f"dp * tp * pp = {dp} * {config.tp} * {config.pp} = {dp * others}, but {ranks}; "
            f"{way_out}"
        )
    if config.batch % dp:
        up, fits = -(-config.batch // dp) * dp, some_divisors(config.batch, near=dp)
        raise ConfigError(
            f"--batch {config.batch} does not divide over dp = {dp} ranks; try --batch {up}, or "
            f"--dp {fits}"
        )
    return dp


def _other_layouts(config: TrainConfig, model: ModelConfig, num_ranks: int) -> str:
    """The valid layouts as text for an error, one a line."""
    layouts = valid_layouts(config, model, num_ranks)
    if not layouts:
        return f"another number: this model and batch cannot be cut over {num_ranks}"
    lines = [
        f"--dp {dp} --tp {tp} --pp {pp}{_uneven(model.layers, pp)}"
        for dp, tp, pp in layouts[:_MOST_LAYOUTS]
    ]
    if len(layouts) > _MOST_LAYOUTS:
        lines.append(f"and {len(layouts) - _MOST_LAYOUTS} more")
    return "\n  ".join((f"one of the layouts for {num_ranks}:", *lines))


def _uneven(layers: int, pp: int) -> str:
    """The flag that splits `layers` over `pp` stages, where they do not divide."""
    return f" --stage-layers {_words(even_split(layers, pp))}" if layers % pp else ""


def _check_device(config: TrainConfig, model: ModelConfig) -> None:
    """Raises ConfigError for what the kernels of the device cannot do."""
    if config.device == "cpu":
        if config.dtype == "bfloat16":
            raise ConfigError(
                "--dtype bfloat16 needs --device cuda; on the CPU use --dtype float32 (or float64)"
            )
        return
    if config.dtype == "float64":
        raise ConfigError(
            "--dtype float64 needs --device cpu; the CUDA kernels compute in float32 and bfloat16"
        )
    if config.node_shared == "on":
        raise ConfigError(
            "--node-shared on needs --device cpu: it shares the host's memory; leave it out on a "
            "GPU"
        )
    if model.head_width not in HEAD_WIDTHS:
        fits = [heads for heads in divisors(model.dim) if model.dim // heads in HEAD_WIDTHS]
        ways = (
            f"--heads {or_list(fits)}"
            if fits
            else f"a --dim that is a multiple of {HEAD_WIDTHS[0]}"
        )
        raise ConfigError(
            f"dim / heads = {model.dim} / {model.heads} = {model.head_width}, and attention's CUDA "
            "kernels are for heads of "
            f"{or_list(HEAD_WIDTHS)}; use {ways}"
        )
    if model.dim > WIDEST_NORM:
        raise ConfigError(
            f"--dim {model.dim} is more than the {WIDEST_NORM} channels that a norm's CUDA kernel "
            "holds in registers"
        )


def _check_tensor_parallel(config: TrainConfig, model: ModelConfig) -> None:
    for name, total in _cut_over_tp(config, model).items():
        if total % config.tp:
            why = " with --sequence-parallel" if name == "context" else ""
            fits = some_divisors(total, near=config.tp)
            raise ConfigError(
                f"{flag(name)} {total} does not divide over --tp {config.tp}{why}; --tp can be "
                f"{fits}"
            )


def _stage_layers(config: TrainConfig) -> tuple[int, ...]:
    """Layers of each stage, in order."""
    layers, pp, given = config.layers, config.pp, config.stage_layers
    if pp > layers:
        raise ConfigError(
            f"--pp {pp} stages cannot share --layers {layers}; --pp can be "
            f"{some_divisors(layers, near=pp)}"
        )
    even = even_split(layers, pp)
    if given is None:
        if layers % pp:
            fits = some_divisors(layers, near=pp)
            raise ConfigError(
                f"--layers {layers} does not divide over --pp {pp}; try --stage-layers "
                f"{_words(even)}, or --pp {fits}"
            )
        return even
    words = [word.strip() for word in given.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(
            f"--stage-layers {given!r} must be whole numbers above 0 with commas between, as in "
            f"{_words(even)}"
        )
    sizes = tuple(int(word) for word in words)
    if len(sizes) != pp:
        raise ConfigError(
            f"--stage-layers {given} names {len(sizes)} stages, but --pp is {pp}; pass --pp "
            f"{len(sizes)}, or {_words(even)}"
        )
    if sum(sizes) != layers:
        raise ConfigError(
            f"--stage-layers {given} adds up to {sum(sizes)}, but --layers is {layers}; try "
            f"{_words(even)}"
        )
    return sizes


def _recompute(
    config: TrainConfig, model: ModelConfig, sequences: int
) -> Literal["none", "selective", "full"]:
    """What was asked for, or selective recomputation where it saves much; `sequences` pass through
    a block and stay on the tape."""
    if config.recompute != "auto":
        return config.recompute
    saved = (
        sequences
        * model.context
        * (2 * model.dim + model.ffn_dim // config.tp)
        * float_dtype(config.dtype).itemsize
    )
    return "selective" if saved >= RECOMPUTE_BYTES else "none"


def _microbatch(config: TrainConfig, dp: int) -> int:
    """Sequences per microbatch on one rank: what was asked, or the whole share, with a pipeline cut
    into about 2 pp microbatches."""
    share = config.batch // dp
    if config.microbatch is not None:
        if share % config.microbatch:
            fits = some_divisors(share, near=config.microbatch)
            asked = f"--batch {config.batch} over dp = {dp} is {share} sequences a rank, which --microbatch {config.microbatch}"
            raise ConfigError(f"{asked} does not divide; --microbatch can be {fits}")
        return config.microbatch
    if config.pp == 1:
        return share
    return min(divisors(share), key=lambda size: abs(share // size - 2 * config.pp))
