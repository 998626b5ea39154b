"""New rank of a run: what it must know, as the survivors tell it in JSON.

It reads the data for itself. Everything else that the ranks once decided together, such as the
microbatch, is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.comm.cores import threads_in_use
from minillm.comm.single import SelfCommunicator
from minillm.layout.mesh_shape import MeshShape
from minillm.tasks.protocol import Dataset
from minillm.training.arguments import StartOptions
from minillm.training.config import RunConfig
from minillm.training.origin import Origin
from minillm.training.resolve import ResolvedConfig, resolve, with_replicas

if TYPE_CHECKING:
    from minillm.training.loop import Run


DECIDED = ("microbatch", "microbatch_tokens", "recompute", "per_node")
"""Fields of the configuration that the ranks have decided together."""


class Parts(NamedTuple):
    """Parts of a run that a new rank has made from what it was told."""

    config: ResolvedConfig
    data: Dataset
    out: Path
    origin: Origin | None


def description(run: Run) -> dict[str, Any]:
    """Return what a new rank of `run` must know, as a JSON value."""
    config, origin = run.config, run.origin
    mesh = dataclasses.replace(config.mesh, dp=config.planned_dp)
    return {
        "options": config.options.to_dict(),
        "planned": dataclasses.asdict(mesh),
        **{name: getattr(config, name) for name in DECIDED},
        "threads": threads_in_use().threads,
        "vocabulary": run.data.vocabulary(),
        "corpus": run.data.sha256,
        "out": str(run.out),
        "origin": None if origin is None else [str(origin.path), origin.continues],
        "first_step": run.first_step,
        "spikes": run.spikes.state(),
        "position": run.position(run.first_step),
        "started_with": run.started_with,
    }


def options_of(found: Mapping[str, Any]) -> RunConfig:
    """Return the options of the run that `description` has described."""
    return RunConfig.from_dict(found["options"])


def rebuilt(found: Mapping[str, Any], dp: int) -> Parts:
    """Make the configuration and load the data that `description` has described, for `dp` replicas.

    Raises ConfigError if the data are others than those of the survivors.
    """
    options, alone = options_of(found), SelfCommunicator()
    data = options.objective.load(options.corpus, options.shape, found["vocabulary"], alone)
    if data.sha256 != found["corpus"]:
        raise ConfigError(
            f"{data.source} has changed since the run began (sha256 {data.sha256[:12]}, then "
            f"{found['corpus'][:12]}), so this rank cannot take the place of a lost one"
        )
    planned = MeshShape(**found["planned"])
    config = resolve(options, planned.num_ranks, data.vocab_size, found["per_node"])
    config = dataclasses.replace(config, **{name: found[name] for name in DECIDED})
    if dp != config.mesh.dp:
        config = with_replicas(config, dp)
    return Parts(config, data, Path(found["out"]), _origin(found["origin"]))


def _origin(found: list[Any] | None) -> Origin | None:
    """Return the checkpoint that the run started from; None if there is none any more."""
    if found is None or not Path(found[0]).exists():
        return None
    path, continues = found
    start = StartOptions(resume=path) if continues else StartOptions(init_from=path)
    return Origin.find(SelfCommunicator(), start)
