"""Configuration of a training run: the options of every subject, and the presets.

Every option is one flag of `python -m minillm.train`, one key of a `--config` file and one key of
a checkpoint's configuration. A subsystem adds its options with a `Record` of its own and one field
of `RunConfig`. An option left at None follows from the others: `minillm.training.resolve` fills it
in once the number of ranks and the vocabulary are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm.base.errors import ConfigError
from minillm.base.options import ComputeOptions
from minillm.base.record import Record, flag, known_name
from minillm.comm.options import CommOptions
from minillm.data.options import DataOptions
from minillm.layout.options import LayoutOptions
from minillm.models.gpt_config import ModelOptions
from minillm.pipeline.options import PipelineOptions
from minillm.replication.options import ReplicationOptions
from minillm.training.options import OptimizationOptions, OutputOptions


@dataclass(frozen=True, kw_only=True)
class RunConfig(Record):
    """Train a GPT, on one process or over the ranks of mpirun.

    mpirun -n 4 python -m minillm.train --preset nano --tp 2

    The README explains layouts, data and output. --print-config shows every value.
    """

    preset: str = "nano"
    """Named set of defaults: nano, shakespeare-char, gpt2, gpt2-medium, gpt2-large, gpt2-xl or
    llama-tiny."""
    model: ModelOptions = field(default=ModelOptions())
    corpus: DataOptions = field(default=DataOptions(), metadata={"title": "data"})
    optimization: OptimizationOptions = field(default=OptimizationOptions())
    compute: ComputeOptions = field(default=ComputeOptions())
    layout: LayoutOptions = field(default=LayoutOptions())
    pipeline: PipelineOptions = field(default=PipelineOptions())
    replication: ReplicationOptions = field(default=ReplicationOptions())
    output: OutputOptions = field(default=OutputOptions())
    comm: CommOptions = field(default=CommOptions())


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


def preset_values(name: str) -> dict[str, Any]:
    """Return the options that the preset `name` sets, its name included.

    Raises ConfigError with close matches for an unknown name.
    """
    return {**PRESETS[known_name(name, PRESETS, "preset")], "preset": name}


# Options that weights bring along for a run that starts from them. The other options of the model
# (context, dropout) and the text only have the old run's values as defaults.
FIXED_BY_WEIGHTS = (
    *(name for name in ModelOptions.options() if name not in ("context", "dropout")),
    *("tokenizer", "dtype"),
)
FROM_WEIGHTS = (*FIXED_BY_WEIGHTS, "context", "dropout", "data")


def check_resume(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ConfigError unless `config` continues the run whose checkpoint holds `saved`."""
    known = config.options()
    fixed = [name for name in known if not known[name].resumable]
    if changed := _changed(saved, config, fixed):
        may = ", ".join(flag(name) for name in known if known[name].resumable)
        raise ConfigError(
            f"a resumed run cannot change {changed}; leave it out, or start a new run from "
            f"these weights with --init-from. These may change: {may}"
        )


def check_weights(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ConfigError unless a run of `config` can begin with the weights of `saved`.

    A learned table of positions cannot grow; rotary and sinusoidal positions have none.
    """
    if changed := _changed(saved, config, FIXED_BY_WEIGHTS):
        raise ConfigError(
            f"weights taken by --init-from cannot change {changed}; leave it out, or train a new "
            "model"
        )
    had, wanted = saved["context"], config.model.context
    if config.model.position == "learned" and wanted > had:
        raise ConfigError(
            f"--context {wanted} is longer than the {had} positions that the weights of "
            f"--init-from have learned; use --context {had} or less. A model trained with "
            "--position rotary can be continued at a longer context"
        )


def _changed(saved: Mapping[str, Any], config: RunConfig, names: Iterable[str]) -> str:
    """Return the options of `names` that differ from `saved`, as text."""
    before, now = type(config).from_dict(saved, "the checkpoint").to_dict(), config.to_dict()
    return ", ".join(
        f"{flag(name)} {now[name]} (was {before[name]})"
        for name in names
        if before[name] != now[name]
    )
