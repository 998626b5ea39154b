"""Table of the optimizers: what `--optimizer` chooses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from minillm.comm.mesh import Mesh
from minillm.models.protocol import StageModel
from minillm.replication.protocol import MakeOptimizer
from minillm.training.muon import Muon
from minillm.training.optim import SGD, AdamW
from minillm.training.options import OptimizationOptions


@dataclass(frozen=True)
class Rule:
    """Optimizer as data. Functions take the options of the run."""

    make: Callable[[OptimizationOptions, Mesh | None], MakeOptimizer]
    """Return a function that makes it from flat buffers. A rule with `whole` needs the mesh."""
    moments: Callable[[OptimizationOptions], tuple[int, int]]
    """Arrays of state, masters left out: of hidden matrices, and of all other parameters."""
    whole: bool = False
    """True if it needs whole hidden matrices."""


def _adamw(options: OptimizationOptions, mesh: Mesh | None) -> MakeOptimizer:
    return functools.partial(
        AdamW,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        cautious=options.cautious,
    )


def _muon(options: OptimizationOptions, mesh: Mesh | None) -> MakeOptimizer:
    assert mesh is not None, "this optimizer needs the ranks along tp"
    return functools.partial(
        Muon,
        mesh=mesh,
        momentum=options.resolve_momentum(),
        ratio=options.muon_ratio,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        cautious=options.cautious,
    )


def _sgd(options: OptimizationOptions, mesh: Mesh | None) -> MakeOptimizer:
    return functools.partial(
        SGD, momentum=options.resolve_momentum(), weight_decay=options.weight_decay
    )


def _sgd_moments(options: OptimizationOptions) -> tuple[int, int]:
    number = int(options.resolve_momentum() > 0)
    return number, number


OPTIMIZERS = {
    "adamw": Rule(_adamw, lambda options: (2, 2)),
    "muon": Rule(_muon, lambda options: (1, 2), whole=True),
    "sgd": Rule(_sgd, _sgd_moments),
}


def maker(options: OptimizationOptions, mesh: Mesh | None = None) -> MakeOptimizer:
    """Return a function that makes the optimizer of the options from flat buffers."""
    return OPTIMIZERS[options.optimizer].make(options, mesh)


def mark_whole(model: StageModel, options: OptimizationOptions) -> None:
    """Mark the parameters that the optimizer needs whole."""
    for parameter in model.parameters():
        parameter.whole = parameter.matrix and OPTIMIZERS[options.optimizer].whole
