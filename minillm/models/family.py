"""Model families: what the engine knows of one, and how `--model` finds it.

A family is one file of this folder with a `FAMILY`. Files are found, not listed.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from minillm import models
from minillm.base.errors import ConfigError
from minillm.base.record import Record, known_name, or_list
from minillm.models.protocol import Architecture

# What the models of a family write -> the program that does it, and the verb for messages.
WRITERS = {
    "text": ("generate", "continue text"),
    "translation": ("translate", "translate"),
    "embeddings": ("embed", "embed texts"),
    "predictions": ("predict", "make predictions for texts"),
}
DEFAULT = "gpt"  # of --model, and the family of checkpoints that name none


class Shape(Protocol):
    """Shape of a model, equal on every rank: all that the engine asks of it."""

    @property
    def layers(self) -> int:
        """Number of layers that pipeline stages share."""

    @property
    def vocab(self) -> int:
        """Number of different tokens; 0 without a vocabulary."""

    @property
    def context(self) -> int:
        """Most positions of a sequence. In rates and memory each sequence counts as that many."""

    @property
    def head_width(self) -> int | None:
        """Channels of an attention head; None without attention."""

    @property
    def dropout(self) -> float:
        """Share of activations dropped in training."""

    @property
    def training_flops(self) -> float:
        """FLOP to train on one position."""

    def layer_costs(self) -> Sequence[float]:
        """Return the cost of each layer in any unit, embedding and head in the first and last."""

    def cut_over_tp(self, sequence_parallel: bool) -> Mapping[str, int]:
        """Return option -> size that tensor parallelism divides. Vocabularies are padded."""

    def check_device(self, device: str) -> None:
        """Raise ConfigError if "cpu" or "cuda" has no kernels for these sizes."""

    def describe(self) -> str:
        """Return the sizes in words, for the plan."""


@runtime_checkable
class Comparing(Shape, Protocol):
    """Shape of a model whose loss compares the examples of a step (`Joint`)."""

    @property
    def least_examples(self) -> int:
        """Examples that make a loss: with fewer in a step it is constant."""


class ShapeOptions(Record, ABC):
    """Base of a family's options: its flags, the table [model] of files, part of checkpoints."""

    FREE: ClassVar[tuple[str, ...]] = ("context", "dropout")
    """Options that a run from old weights may change. The weights fix the others."""
    TRAINING: ClassVar[tuple[str, ...]] = ("dropout",)
    """Options of training alone, which files of other libraries do not keep."""

    @abstractmethod
    def resolve(self, vocab: int | None = None) -> Shape:
        """Return the shape for data of `vocab` different tokens.

        It has an attribute for each option. Raises ConfigError for sizes that do not fit together,
        and where the number of tokens is unknown.
        """

    def check_weights(self, had: Self) -> None:
        """Raise ConfigError if a model of these options cannot begin with weights of `had`.

        The options that are not `FREE` are equal.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Family of models, as `--model` names it."""

    name: str
    options: type[ShapeOptions]
    architecture: Architecture
    objective: str
    """Name of what it trains on, in minillm/tasks."""
    presets: Mapping[str, Mapping[str, Any]]
    """Preset -> values of any options of a run. The first preset is the default."""
    writes: str | None = None
    """Output of its trained models: "text" that continues a prompt, a "translation" of a source,
    "embeddings" of texts, or "predictions" for them; None: none."""
    first_reader: str = "python -m minillm.evaluate"
    """Program that a finished run recommends, without its flag --checkpoint."""
    also: tuple[str, ...] = ()
    """Further outputs of its trained models."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> option that says how many of its rows a model has. A run may start from weights
    with more rows."""
    heads: tuple[str, ...] = ()
    """Beginnings of the names of parameters that belong to an objective. A run may start from
    weights without them, of another objective, and then gives them initial values."""

    def check_writes(self, what: str = "text") -> None:
        """Raise ConfigError unless its models write `what`: "text", a "translation", ..."""
        if what not in (self.writes, *self.also):
            able = or_list(
                f"--model {name}"
                for name, it in families().items()
                if what in (it.writes, *it.also)
            )
            does = WRITERS[what][1]
            raise ConfigError(f"a model of --model {self.name} does not {does}; use one of {able}")


_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known that has no file in this folder."""
    _registered[family.name] = family


def families() -> dict[str, Family]:
    """Return all families by name, the default first."""
    return _found() | _registered


@functools.cache
def _found() -> dict[str, Family]:
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    modules = (importlib.import_module(f"{models.__name__}.{name}") for name in names)
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {each.name: each for each in sorted(found, key=lambda each: each.name != DEFAULT)}


def family(name: str) -> Family:
    """Return the family `name`. Raises ConfigError with close matches for an unknown one."""
    return families()[known_name(name, families(), "model")]


def family_of_preset(name: str) -> Family:
    """Return the family that has the preset `name`.

    Raises ConfigError with close matches for an unknown one.
    """
    owners = {preset: each for each in families().values() for preset in each.presets}
    return owners[known_name(name, owners, "preset")]
