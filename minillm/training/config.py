"""Configuration of a training run: the options of every subject, and the presets.

Every option is one flag of `python -m minillm.train`, one key of a `--config` file and one key of
a checkpoint's configuration. A subsystem adds its options with a `Record` of its own and one field
of `RunConfig`. An option left at None follows from the others: `minillm.training.resolve` fills it
in once the number of ranks and the vocabulary are known.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """Train a GPT, on one process or over the ranks of mpirun."""

    preset: str = "nano"
    """Named set of defaults: nano, shakespeare-char, gpt2, gpt2-medium, gpt2-large, gpt2-xl or
    llama-tiny."""
    model: ModelOptions = field(default=ModelOptions())
    corpus: DataOptions = field(default=DataOptions())
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
    return model | training | dict(eval_every=1000, eval_tokens=1 << 20, save_every=1000)


def _shakespeare_char() -> dict[str, Any]:
    """Return nanoGPT's setting for a laptop.

    It is config/train_shakespeare_char.py with the CPU flags of the README.
    """
    model = dict(layers=4, heads=4, dim=128, context=64, dropout=0.0, bias=False)
    training = dict(batch=12, steps=2000, lr=1e-3, min_lr=1e-4, warmup=100, beta2=0.99)
    return dict(data="shakespeare", tokenizer="char") | model | training | dict(eval_every=250)


# Preset -> the options that it sets. The others keep their defaults, which are the preset nano.
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


def preset_values(name: str) -> dict[str, Any]:
    """Return the options that the preset `name` sets, its name included.

    Raises ConfigError with close matches for an unknown name.
    """
    return {**PRESETS[known_name(name, PRESETS, "preset")], "preset": name}


def check_resume(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ConfigError unless `config` continues the run whose checkpoint holds `saved`."""
    before = type(config).from_dict(saved, "the checkpoint").to_dict()
    now, known = config.to_dict(), config.options()
    changed = [
        f"{flag(name)} {now[name]} (was {before[name]})"
        for name in before
        if not known[name].resumable and before[name] != now[name]
    ]
    if changed:
        may = ", ".join(flag(name) for name in before if known[name].resumable)
        raise ConfigError(
            f"a resumed run cannot change {', '.join(changed)}; leave it out, or start a new run. "
            f"These may change: {may}"
        )
