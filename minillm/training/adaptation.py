"""Adaptation of pretrained weights: what trains, at which learning rates, and low-rank updates.

Everything follows from the names of a model's parameters and from their depth: embeddings are 0,
layer l is l + 1, and what comes behind the layers is layers + 1.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from minillm.base.errors import ConfigError
from minillm.base.record import Record, flag, option, or_list
from minillm.models.family import Family, Shape
from minillm.models.protocol import Architecture, StageModel, StagePart, num_parameters
from minillm.nn.linear import AdaptableLinear
from minillm.nn.lora import FACTORS, LowRank, map_of, scale_of
from minillm.parallel.tensor import PlannedGroup, TensorParallel

EMBEDDINGS = "embeddings"
LAYERS = "layers:"
PLAIN: Mapping[str, Any] = {"freeze": None, "lora": 0, "lora_alpha": None, "lora_targets": None}
"""Options with which a model is read: low-rank updates are merged then (`Merged`)."""


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions(Record):
    """Adaptation of pretrained weights, as in `--freeze embeddings,layers:2` (docs/adapting.md)."""

    freeze: str | None = option(None)
    """Parameters that keep their values: names, patterns such as blocks.*.mlp.*, embeddings, or
    layers:N for the first N layers; several as embeddings,layers:2."""
    layer_decay: float = option(1.0, above=0, announced=True)
    """Factor F of the learning rate from each layer to the one below: layer l of n, counted from 0,
    has lr F^(n - l), the head lr, the embeddings the lowest."""
    lora: int = option(0, at_least=0)
    """Rank of low-rank updates of the linear layers: they train alone, with the heads of the task;
    0: none."""
    lora_alpha: float | None = option(None, above=0)
    """Factor of a low-rank update is this / rank; left out: twice the rank."""
    lora_targets: str | None = option(None)
    """Linear layers with a low-rank update, by the last part of their names or by patterns, as
    qkv,out; left out: all in the layers."""

    def __post_init__(self) -> None:
        """Raise ConfigError for rates that fall towards the head."""
        super().__post_init__()
        if self.layer_decay > 1:
            raise ConfigError(
                f"--layer-decay {self.layer_decay:g} lets the lowest layers learn fastest; choose "
                "a factor of at most 1, such as 0.9"
            )


def adapt(model: StageModel, options: AdaptationOptions, family: Family, shape: Shape) -> None:
    """Add the factors of a low-rank update to a stage, and mark what is frozen, and each rate."""
    if options == type(options)():
        return
    scale = scale_of(options.lora, options.lora_alpha)
    for layer in _adaptable(model):
        if options.lora and _is_target(options, layer.name):
            layer.lora = LowRank(layer.weight.spec, options.lora, scale)
            layer.lora.assign_names(f"{layer.name}{FACTORS}".rstrip("."))
    depth, layers = depth_of(family.architecture, shape), shape.layers
    for parameter in model.parameters():
        name, at = parameter.name, depth[map_of(parameter.name)]
        parameter.trains = not options.lora or name.startswith(family.heads) or FACTORS in name
        if any(_names(pattern, name, at, layers) for pattern in _listed(options.freeze)):
            parameter.trains = False
        parameter.rate = options.layer_decay ** (layers + 1 - at)


def check(options: AdaptationOptions, family: Family, shape: Shape) -> None:
    """Raise ConfigError for a pattern that matches nothing, and if nothing is left to train."""
    if options == type(options)():
        return
    for name in ("lora_alpha", "lora_targets"):
        if (value := getattr(options, name)) is not None and not options.lora:
            raise ConfigError(f"{flag(name)} {value} needs --lora RANK, such as --lora 8")
    model, layers = _whole(family, shape), shape.layers
    targets = [layer.name for layer in _adaptable(model)]
    if options.lora and not targets:
        raise ConfigError(f"--lora: a model of --model {family.name} has no linear layers to adapt")
    for target in _listed(options.lora_targets):
        if not any(_is_layer(target, name) for name in targets):
            _refuse("--lora-targets", target, [*_last(targets), *targets], "linear layer")
    adapt(model, options, family, shape)
    depth = depth_of(family.architecture, shape)
    names = {parameter.name: depth[map_of(parameter.name)] for parameter in model.parameters()}
    modules = {name.rsplit(".", number)[0] for name in names for number in range(name.count("."))}
    for pattern in _listed(options.freeze):
        if not any(_names(pattern, name, at, layers) for name, at in names.items()):
            _refuse("--freeze", pattern, [*names, *sorted(modules), EMBEDDINGS], "parameter")
    if not any(parameter.trains for parameter in model.parameters()):
        raise ConfigError(f"--freeze {options.freeze} leaves nothing to train; freeze less")


def num_trained(options: AdaptationOptions, family: Family, shape: Shape) -> int:
    """Return the number of values that train: a tied weight counts once, padding not at all."""
    if options == type(options)():
        return num_parameters(family.architecture, shape)
    model = _whole(family, shape)
    adapt(model, options, family, shape)
    return sum(math.prod(p.spec.shape) for p in model.parameters() if p.trains)


def _whole(family: Family, shape: Shape) -> StageModel:
    """Return the whole model, without memory."""
    part, region = StagePart(range(shape.layers), True, True), TensorParallel(PlannedGroup())
    return family.architecture.build(shape, part, region, seed=0, recompute="none", std=1.0)


def _adaptable(model: Any) -> list[AdaptableLinear]:
    """Return the linear layers of a model that may have a low-rank update."""
    return list(model.modules(AdaptableLinear))


def _is_target(options: AdaptationOptions, layer: str) -> bool:
    targets = _listed(options.lora_targets)
    return not targets or any(_is_layer(target, layer) for target in targets)


def _is_layer(target: str, layer: str) -> bool:
    """Return whether a target is the last part of a layer's name, or fits all of it."""
    return target in _last([layer]) or _matches(target, layer)


def _last(names: Iterable[str]) -> list[str]:
    """Return the last part of each name, once."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _refuse(given: str, pattern: str, known: Iterable[str], what: str) -> NoReturn:
    near = difflib.get_close_matches(pattern, list(dict.fromkeys(known)), 3, 0)
    raise ConfigError(f"{given} {pattern} names no {what}; the nearest names are {or_list(near)}")


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


def _names(pattern: str, name: str, depth: int, layers: int) -> bool:
    """Return whether an entry of --freeze names a parameter, which lies at `depth`."""
    if pattern == EMBEDDINGS:
        return depth == 0
    if pattern.startswith(LAYERS):
        return 1 <= depth <= _num_layers(pattern, layers)
    return _matches(pattern, name)


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


def _listed(given: str | None) -> list[str]:
    """Return the parts of a list that commas join."""
    return [part.strip() for part in (given or "").split(",") if part.strip()]
