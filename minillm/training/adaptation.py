"""Adaptation of pretrained weights: which parameters train, and at which learning rates.

Everything follows from the names of a model's parameters and from their depth: embeddings are 0,
layer l is l + 1, and what comes behind the layers is layers + 1.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option, or_list
from minillm.models.family import Family, Shape
from minillm.models.protocol import Architecture, StageModel, StagePart
from minillm.parallel.tensor import PlannedGroup, TensorParallel

EMBEDDINGS = "embeddings"
LAYERS = "layers:"


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions(Record):
    """Adaptation of pretrained weights, as in `--freeze embeddings,layers:2` (docs/adapting.md)."""

    freeze: str | None = option(None)
    """Parameters that keep their values: names, patterns such as blocks.*.mlp.*, embeddings, or
    layers:N for the first N layers; several as embeddings,layers:2."""
    layer_decay: float = option(1.0, above=0, announced=True)
    """Factor F of the learning rate from each layer to the one below: layer l of n, counted from 0,
    has lr F^(n - l), the head lr, the embeddings the lowest."""

    def __post_init__(self) -> None:
        """Raise ConfigError for rates that grow towards the embeddings."""
        super().__post_init__()
        if self.layer_decay > 1:
            raise ConfigError(
                f"--layer-decay {self.layer_decay:g} lets the lowest layers learn fastest; choose "
                "a factor of at most 1, such as 0.9"
            )


def adapt(model: StageModel, options: AdaptationOptions, family: Family, shape: Shape) -> None:
    """Mark the parameters of a stage that are frozen, and those with rates of their own."""
    if options == type(options)():
        return
    depth, trains = depth_of(family.architecture, shape), _trains(options, family, shape)
    for parameter in model.parameters():
        parameter.trains = trains(parameter.name)
        parameter.rate = options.layer_decay ** (shape.layers + 1 - depth[parameter.name])


def check(options: AdaptationOptions, family: Family, shape: Shape) -> None:
    """Raise ConfigError for a pattern that matches nothing, and if nothing is left to train."""
    if options == type(options)():
        return
    depth = depth_of(family.architecture, shape)
    modules = {name.rsplit(".", number)[0] for name in depth for number in range(name.count("."))}
    for pattern in _patterns(options.freeze):
        if pattern.startswith(LAYERS):
            _num_layers(pattern, shape.layers)
        elif pattern != EMBEDDINGS and not any(_matches(pattern, name) for name in depth):
            known = [*depth, *sorted(modules), EMBEDDINGS]
            near = difflib.get_close_matches(pattern, known, 3, 0)
            raise ConfigError(
                f"--freeze {pattern} names no parameter; the nearest names are {or_list(near)}"
            )
    if not num_trained(options, family, shape):
        raise ConfigError(f"--freeze {options.freeze} leaves nothing to train; freeze less")


def num_trained(options: AdaptationOptions, family: Family, shape: Shape) -> int:
    """Return the number of values that train: a tied weight counts once, padding not at all."""
    specs = family.architecture.specs(shape)
    trains = _trains(options, family, shape)
    return sum(math.prod(spec.shape) for name, spec in specs.items() if trains(name))


def depth_of(architecture: Architecture, shape: Shape) -> Mapping[str, int]:
    """Return the depth of every parameter of a model by name.

    A weight that embedding and head share lies at the embedding's.
    """
    key: Any = (architecture, shape)
    return _depths(*key)


@functools.lru_cache(maxsize=8)
def _depths(architecture: Architecture, shape: Shape) -> Mapping[str, int]:
    def names(layers: range, first: bool = False) -> list[str]:
        region, part = TensorParallel(PlannedGroup()), StagePart(layers, first, False)
        built = architecture.build(shape, part, region, seed=0, recompute="none", std=1.0)
        return [parameter.name for parameter in built.parameters()]

    found = dict.fromkeys(names(range(0), first=True), 0)
    for layer in range(shape.layers):
        for name in names(range(layer, layer + 1)):
            found.setdefault(name, layer + 1)
    for name in architecture.specs(shape):
        found.setdefault(name, shape.layers + 1)
    return found


def _trains(options: AdaptationOptions, family: Family, shape: Shape) -> Callable[[str], bool]:
    """Return the function that tells of a parameter's name whether it trains."""
    frozen = {
        name
        for pattern in _patterns(options.freeze)
        for name in _named(pattern, depth_of(family.architecture, shape), shape.layers)
    }
    return lambda name: name not in frozen


def _named(pattern: str, depth: Mapping[str, int], layers: int) -> Iterable[str]:
    """Return the parameters that an entry of --freeze names."""
    if pattern == EMBEDDINGS:
        return [name for name, at in depth.items() if at == 0]
    if pattern.startswith(LAYERS):
        number = _num_layers(pattern, layers)
        return [name for name, at in depth.items() if 1 <= at <= number]
    return [name for name in depth if _matches(pattern, name)]


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern is or fits the name of a parameter, or of a module around it."""
    return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _num_layers(pattern: str, layers: int) -> int:
    number = pattern.removeprefix(LAYERS)
    if not number.isdecimal() or not 1 <= int(number) <= layers:
        raise ConfigError(
            f"--freeze {pattern}: the model has {layers} layers; choose a number from 1 to {layers}"
        )
    return int(number)


def _patterns(freeze: str | None) -> list[str]:
    return [part.strip() for part in (freeze or "").split(",") if part.strip()]
