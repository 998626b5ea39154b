"""Configuration of a training run: the options of every subject, for any family of models.

Every option is one flag of `python -m minillm.train`, one key of a `--config` file and one key of
a checkpoint's configuration. A subsystem adds its options with a `Record` of its own and one field
of `RunConfig`. `--model` decides what stands in two of these rooms: the options of the family, and
those of the data that it trains on. An option left at None follows from the others:
`minillm.training.resolve` fills it in once the number of ranks and the vocabulary are known.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from minillm.base.errors import ConfigError
from minillm.base.options import ComputeOptions
from minillm.base.record import Record, flag, or_list, with_defaults
from minillm.comm.options import CommOptions
from minillm.data.options import SourceOptions
from minillm.data.token_batches import TokenBatches
from minillm.layout.options import LayoutOptions
from minillm.models.family import DEFAULT, Family, ShapeOptions, families, family, family_of_preset
from minillm.pipeline.options import PipelineOptions
from minillm.replication.options import ReplicationOptions
from minillm.tasks.objectives import objective
from minillm.tasks.protocol import Dataset, Deciding, Objective
from minillm.training.adaptation import AdaptationOptions
from minillm.training.batching import batches_of
from minillm.training.options import OptimizationOptions, OutputOptions, SpikeOptions

RunConfigT = TypeVar("RunConfigT", bound="RunConfig")

_FIRST = families()[DEFAULT]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Record):
    """Train a model, on one process or over the ranks of mpirun.

    mpirun -n 4 python -m minillm.train --preset nano --tp 2

    The README explains layouts, data and output. --print-config shows every value.
    """

    model: str = DEFAULT
    """Family of the model."""
    preset: str = next(iter(_FIRST.presets))
    """Named set of defaults."""
    shape: ShapeOptions = field(default=_FIRST.options(), metadata={"title": "model"})
    corpus: SourceOptions = field(
        default=objective(_FIRST.objective).options(), metadata={"title": "data"}
    )
    optimization: OptimizationOptions = field(default=OptimizationOptions())
    adaptation: AdaptationOptions = field(default=AdaptationOptions())
    compute: ComputeOptions = field(default=ComputeOptions())
    layout: LayoutOptions = field(default=LayoutOptions())
    pipeline: PipelineOptions = field(default=PipelineOptions())
    replication: ReplicationOptions = field(default=ReplicationOptions())
    spikes: SpikeOptions = field(default=SpikeOptions())
    output: OutputOptions = field(default=OutputOptions())
    comm: CommOptions = field(default=CommOptions())

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of bounds, and for options of another family."""
        super().__post_init__()
        if self.model != type(self).model:
            raise ConfigError(
                f"--model {self.model} has other options than --model {type(self).model}; begin "
                "with a configuration of its own"
            )

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family(self.model)

    @property
    def objective(self) -> Objective:
        """The objective that the family trains on."""
        return objective(self.family.objective)

    @classmethod
    def of(cls, name: str) -> type[Self]:
        """Return this configuration with the options of the family `name`.

        Raises ConfigError for an unknown one.
        """
        return _of_family(cls, family(name))  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Return the configuration that holds the flat table `values`, for the family it names."""
        name = values.get("model", DEFAULT)
        made = cls.of(name if isinstance(name, str) else DEFAULT)
        return super(RunConfig, made).from_dict(values, source)

    @classmethod
    @functools.cache
    def sentences(cls) -> dict[str, str]:
        """Return the help of each field."""
        found = super().sentences()
        own = family(cls.model).presets
        others = [name for each in families().values() for name in each.presets if name not in own]
        more = f"; with another model {or_list(others)}" if others else ""
        return found | {
            "model": f"{found['model'].rstrip('.')}: {or_list(families())}.",
            "preset": f"{found['preset'].rstrip('.')}: {or_list(own)}{more}.",
        }

    @classmethod
    def absent(cls) -> dict[str, str]:
        """Return the options that this configuration refuses by name, those of other families."""
        owners: dict[str, list[str]] = {}
        for name, other in families().items():
            for each in cls.of(name).options().keys() - cls.options().keys():
                owners.setdefault(each, []).append(f"--model {other.name}")
        others = {
            name: f"is an option of {or_list(models)}, not of --model {cls.model}"
            for name, models in owners.items()
        }
        return others | super().absent()


@functools.cache
def _of_family(cls: type[RunConfigT], of: Family) -> type[RunConfigT]:
    """Return `cls` itself, or a subclass with the options of another family."""
    if cls.model == of.name:
        return cls
    return with_defaults(
        cls,
        model=of.name,
        preset=next(iter(of.presets)),
        shape=of.options(),
        corpus=objective(of.objective).options(),
    )


def decided(config: RunConfigT, data: Dataset) -> RunConfigT:
    """Return `config` with the options that its data decide.

    Raises ConfigError for batches by tokens of other data than they are for, and for microbatches
    by tokens that are too small for a sequence.
    """
    batches, most = batches_of(config.optimization, data), config.pipeline.microbatch_tokens
    if isinstance(batches, TokenBatches) and 0 < most < (longest := int(batches.sizes.max())):
        raise ConfigError(
            f"--microbatch-tokens {most} is less than the {longest} tokens of the longest "
            f"sequence; use {longest} or more, or a smaller --context"
        )
    return config.replace(**data.decides(batches)) if isinstance(data, Deciding) else config


def preset_values(name: str) -> dict[str, Any]:
    """Return the options that the preset `name` sets, its name and its family included.

    Raises ConfigError with close matches for an unknown name.
    """
    found = family_of_preset(name)
    return {**found.presets[name], "preset": name, "model": found.name}


def default_values(name: str) -> dict[str, Any]:
    """Return the options that the default preset of the family `name` sets."""
    return preset_values(next(iter(family(name).presets)))


def from_weights(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what weights bring along for a run that starts from them, out of their options.

    Some are fixed (`check_weights`). The others, such as context, dropout and the text, are
    defaults.
    """
    made = RunConfig.of(saved.get("model", DEFAULT))
    names = ("model", *made.shape.options(), *made.corpus.TRAINS, "dtype")
    found = {name: saved[name] for name in names if name in saved}
    # Those of a preset would change what the weights fix.
    return found | {name: saved.get(name, getattr(made.corpus, name)) for name in made.corpus.FIXED}


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

    Weights saved without a dtype are converted to any.
    """
    shape, corpus = config.shape, config.corpus
    fixed = [name for name in shape.options() if name not in shape.FREE]
    fixed += [*corpus.FIXED, *(["dtype"] if "dtype" in saved else [])]
    if changed := _changed(saved, config, fixed):
        raise ConfigError(
            f"a run from these weights cannot change {changed}; leave it out, or train a new model"
        )
    shape.check_weights(type(config).from_dict(saved, "the checkpoint").shape)


def _changed(saved: Mapping[str, Any], config: RunConfig, names: Iterable[str]) -> str:
    """Return the options of `names` that differ from `saved`, as text."""
    before, now = type(config).from_dict(saved, "the checkpoint").to_dict(), config.to_dict()
    return ", ".join(
        f"{flag(name)} {now[name]} (was {before[name]})"
        for name in names
        if before[name] != now[name]
    )
