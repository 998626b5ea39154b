"""Two-tower regressor: a family of models with an objective of its own, all of it in this file.

The first tower embeds points, the second one adds an offset per group. Every difference from a
language model is on purpose. Two losses stand at two stages, with two divisors and masked targets.
An integer array without gradient crosses the boundary. Inputs are no tokens, and metrics are
counts.

    points [B, T, F] -> enter -> block ... -> block -> head -> value [B, T]
                          |                  + offset[group]   (last stage: loss "value")
                          level head (stage 0: loss "level")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm import ops
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.record import Record, option
from minillm.comm.communicator import Communicator
from minillm.data.options import SourceOptions
from minillm.layout.sharding import Segment, ShardSpec
from minillm.models.family import Family, ShapeOptions
from minillm.models.protocol import (
    ArraySpec,
    Batch,
    BoundarySpec,
    StagePart,
    StageResult,
    Workload,
)
from minillm.nn.linear import ColumnParallelLinear, RowParallelLinear
from minillm.parallel.collectives import reduce_from
from minillm.parallel.tensor import PlannedGroup, Region, TensorParallel
from minillm.params.module import Module
from minillm.params.parameter import Normal, Parameter
from minillm.params.where import Pass, Where

NUM_GROUPS = 5
HELD_OUT = 1_000_000  # number of the first held-out sequence


@dataclass(frozen=True, kw_only=True)
class TowerOptions(ShapeOptions):
    """Regressor, as in `--features 6 --hidden 16`."""

    features: int = option(6, at_least=1)
    """Numbers that describe a point."""
    dim: int = option(8, at_least=1)
    """Width of the stream."""
    hidden: int = option(16, at_least=1)
    """Width inside a block."""
    context: int = option(12, at_least=1)
    """Points of a sequence."""
    layers: int = option(4, at_least=1)
    """Number of residual blocks."""

    def resolve(self, vocab: int | None = None) -> Config:
        return Config(**self.to_dict())


@dataclass(frozen=True)
class Config:
    """Shape of the regressor."""

    features: int = 6
    dim: int = 8
    hidden: int = 16
    context: int = 12
    layers: int = 4
    seed: int = 11
    vocab = 0
    head_width = None
    dropout = 0.0

    @property
    def training_flops(self) -> float:
        return 6.0 * self.layers * 2 * self.dim * self.hidden

    def layer_costs(self) -> list[float]:
        return [1.0] * self.layers

    def cut_over_tp(self, sequence_parallel: bool) -> dict[str, int]:
        return {"hidden": self.hidden} | ({"context": self.context} if sequence_parallel else {})

    def check_device(self, device: str) -> None:
        """Accept every device."""

    def describe(self) -> str:
        return f"{self.layers} blocks of width {self.hidden}"


class SquaredError(Function):
    """Sum of squared errors where `mask` is set, divided by `divisor`: a float64 scalar."""

    @staticmethod
    def forward(ctx: Context, x: Any, *, target: Any, mask: Any, divisor: float) -> Any:
        error = np.where(mask, x - target, 0.0)
        ctx.save((2 * error / divisor).astype(x.dtype))
        return np.asarray(np.square(error).sum(dtype=np.float64) / divisor)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any]:
        return (ctx.saved[0] * ctx.saved[0].dtype.type(grad_outs[0]),)


class Squeeze(Function):
    """Squeeze of the last dim, of size 1."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        return x[..., 0]

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any]:
        return (grad_outs[0][..., None],)


class Residual(Module):
    """Residual block: x + row(gelu(column(x)))."""

    def __init__(self, c: Config, region: Region, std: float) -> None:
        features = Segment(c.hidden, ("tp",))
        self.up = ColumnParallelLinear(c.dim, (features,), region, bias=True, std=std)
        self.down = RowParallelLinear(features, c.dim, region, bias=True, std=std)

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        return ops.add(x, self.down(ops.gelu(self.up(x, pass_)), pass_))


class ScalarHead(Module):
    """Scalar head [B, T]: two projections, the second a partial sum over tp."""

    def __init__(self, c: Config, region: Region, std: float) -> None:
        features = Segment(c.hidden, ("tp",))
        self.region = region
        self.up = ColumnParallelLinear(c.dim, (features,), region, bias=False, std=std)
        spec = ShardSpec((1, c.hidden), ((Segment(1),), (features,)))
        self.out = Parameter(spec, Normal(std), decay=True)

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        partial = ops.linear(self.up(x, pass_), self.out)
        return Squeeze.apply(reduce_from(partial, self.region.comm))


class Towers(Module):
    """Stage of the regressor."""

    def __init__(self, c: Config, part: StagePart, region: Region, std: float) -> None:
        self.region, self.part, self.dim = region, part, c.dim
        spec = ShardSpec.replicated(c.dim, c.features, partial_over=region.partial_over)
        self.enter = Parameter(spec, Normal(std), decay=True) if part.first else None
        self.blocks = {layer: Residual(c, region, std) for layer in part.layers}
        self.level = ScalarHead(c, region, std) if part.first else None
        self.head = ScalarHead(c, region, std) if part.last else None
        table = ShardSpec.replicated(NUM_GROUPS, 1)
        self.offset = Parameter(table, Normal(std), decay=False) if part.last else None
        self.assign_names()

    def _pass(self, batch: Batch, training: bool) -> Pass:
        return self.region.outside(Pass(batch.where, batch.where, training))

    def receives(self, batch: Batch) -> BoundarySpec:
        if self.part.first:
            return ()
        num_rows = len(batch.where.samples)
        local, whole = self._pass(batch, False).where.times, batch.where.times
        assert local is not None and whole is not None
        dtype = self.parameters()[0].get().dtype
        return (
            ArraySpec("hidden", (num_rows, len(local), self.dim), dtype, True),
            ArraySpec("group", (num_rows, len(whole)), np.dtype(np.int64), False),
        )

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        pass_ = self._pass(batch, training)
        losses: dict[str, Tensor] = {}
        if self.enter is not None and self.level is not None:
            points = batch.arrays["points"][:, pass_.where.times]
            points = points.astype(self.enter.get().dtype)
            x, group = ops.linear(Tensor(points), self.enter), Tensor(batch.arrays["group"])
            losses["level"] = self._error("level", self.level(x, pass_), batch)
        else:
            x, group = arrived
        for block in self.blocks.values():
            x = block(x, pass_)
        if self.head is None or self.offset is None:
            return StageResult((x, group), losses)
        offset = Squeeze.apply(ops.embedding(group.data, self.offset))
        value = ops.add(self.head(x, pass_), offset)
        losses["value"] = self._error("value", value, batch)
        return StageResult((value,), losses)

    def _error(self, name: str, found: Tensor, batch: Batch) -> Tensor:
        target, mask = batch.arrays[name], batch.arrays[f"{name}_mask"]
        return SquaredError.apply(found, target=target, mask=mask, divisor=batch.divisors[name])


class TowerArchitecture:
    """Architecture of the regressor, as the engine builds it."""

    name = "two-towers"

    def build(
        self,
        config: Config,
        part: StagePart,
        region: Region,
        *,
        seed: int,
        recompute: str,
        std: float,
    ) -> Towers:
        return Towers(config, part, region, std)

    def specs(self, config: Config) -> Mapping[str, ShardSpec]:
        part = StagePart(range(config.layers), True, True)
        whole = Towers(config, part, TensorParallel(PlannedGroup()), 0.02)
        return {parameter.name: parameter.spec for parameter in whole.parameters()}

    def ties(self, config: Config, stages: Sequence[range]) -> Mapping[str, tuple[int, ...]]:
        return {}

    def activation_bytes(self, config: Config, num_layers: int, work: Workload) -> int:
        return work.tokens * (config.dim + 2 * config.hidden) * num_layers * work.itemsize

    def workspace_bytes(self, config: Config, work: Workload, *, last: bool) -> int:
        return work.tokens * 2 * config.hidden * work.itemsize

    def head_bytes(self, config: Config, work: Workload) -> int:
        return work.tokens * config.hidden * work.itemsize


class Regression:
    """Regression task and its metrics: ragged masks, points made from the number of a sequence."""

    losses = ("level", "value")
    sums = ("level", "value", "hits", "counted")

    def __init__(
        self, config: Config, batch: int, num_rows: int = 10, seed: int = 11, first: int = 0
    ) -> None:
        self.config, self.batch_size, self.num_rows = config, batch, num_rows
        self.seed, self.first = seed, first

    def _examples(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Make every sequence from the seed and its number alone."""
        c, made = self.config, []
        for row in numbers:
            rng = np.random.default_rng([self.seed, int(row)])
            points = rng.standard_normal((c.context, c.features))
            made.append(
                dict(
                    points=points,
                    group=rng.integers(0, NUM_GROUPS, c.context),
                    level=points.mean(-1),
                    value=points[:, 0] * points[:, 1],
                    level_mask=rng.random(c.context) < 0.3 + 0.5 * (row % 2),
                    value_mask=rng.random(c.context) < 0.8,
                )
            )
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def _batch(self, step: int, rows: np.ndarray, first: int, divisors: dict[str, float]) -> Batch:
        where = Where(step, rows, np.arange(self.config.context))
        return Batch(self._examples(first + rows), divisors, where)

    def batch(self, *args: Any) -> Batch:
        """Serve as a Task (step, rows, device) and as a Measure (rows, device)."""
        if len(args) == 2:
            return self._batch(0, args[0], HELD_OUT, {"level": 1.0, "value": 1.0})
        step, rows, _ = args
        first = self.first + step * self.batch_size
        whole = self._examples(first + np.arange(self.batch_size))
        counts = {name: float(whole[f"{name}_mask"].sum()) for name in self.losses}
        return self._batch(step, rows, first, counts)

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        mask = batch.arrays["value_mask"]
        hits = np.abs(outputs[0].data - batch.arrays["value"]) < 0.5
        return {"hits": float((hits & mask).sum()), "counted": float(mask.sum())}

    def result(self, sums: Mapping[str, float]) -> Found:
        return Found(dict(sums))


@dataclass(frozen=True)
class Found:
    """Metrics of the regressor: sums by name."""

    sums: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.sums[name]

    def values(self) -> dict[str, float]:
        return {"val_hits": self.sums["hits"] / self.sums["counted"]}

    def numbers(self) -> dict[str, Any]:
        return dict(self.sums)

    def describe(self) -> str:
        return f"{self.values()['val_hits']:.0%} within a half"

    def summary(self, of: int) -> str:
        return f"{self.describe()}, of {of} points"


@dataclass(frozen=True, kw_only=True)
class PointOptions(SourceOptions):
    """Points, as in `--points-seed 5`."""

    points_seed: int = option(11, at_least=0)
    """Seed of the points to learn from."""


@dataclass(frozen=True, kw_only=True)
class PointsToMeasure(Record):
    """Points to measure on, as in `--other-seed 5`."""

    other_seed: int | None = option(None, at_least=0)
    """Seed of the points; left out: that of training."""


class Points:
    """Points of a seed, a `Dataset`."""

    vocab_size = 0

    def __init__(self, seed: int, context: int) -> None:
        self.seed, self.source, self.sha256 = seed, f"points {seed}", f"{seed:064x}"
        self.num_held_out = 10 * context

    def vocabulary(self) -> dict[str, Any]:
        return {}

    def describe(self) -> str:
        return self.source

    def task(self, shape: Config, *, batch: int, seed: int, first: int = 0) -> Regression:
        return Regression(shape, batch, seed=self.seed, first=first)

    def measure(self, shape: Config, tokens: int | None) -> Regression:
        return Regression(shape, 1, seed=self.seed)

    def prompt(self) -> tuple[int, ...]:
        return ()


class PointObjective:
    """Objective "points": two numbers of each point."""

    name = "points"
    options, measured = PointOptions, PointsToMeasure

    def load(
        self,
        options: PointOptions,
        shape: TowerOptions,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> Points:
        return Points(options.points_seed, shape.context)

    def held_out(
        self,
        asked: PointsToMeasure,
        trained: PointOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> Points:
        return Points(asked.other_seed or trained.points_seed, shape.context)


OBJECTIVE = PointObjective()
FAMILY = Family(
    name="two-towers",
    options=TowerOptions,
    architecture=TowerArchitecture(),
    objective="points",
    presets={"towers": dict(steps=20, batch=16), "wide-towers": dict(hidden=64)},
)
