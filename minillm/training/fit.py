"""Choice of a microbatch that fits the memory, and refusal of a run that does not.

Runs before anything is allocated. The ranks of a node share its memory, the ranks of a GPU that
GPU's: their needs are summed and compared with what is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.base.host_memory import size
from minillm.base.record import divisors, flag, or_list
from minillm.comm.communicator import Communicator
from minillm.pipeline.schedules import SCHEDULES
from minillm.replication.methods import may_share
from minillm.replication.node_shared import SPARE_BYTES, free_shared_bytes
from minillm.training.assembly import layout_of
from minillm.training.memory import Need, predicted, predicted_server
from minillm.training.resolve import ResolvedConfig, with_microbatch

# Share of a GPU's free memory that a run may need without recomputation under --recompute auto. The
# rest is for the kernels' code, the workspaces of CUDA's libraries and the gaps of the memory pool.
FULL_TAPE_SHARE = 0.8


def fit(
    config: ResolvedConfig,
    comm: Communicator,
    device: Device = CPU,
    *,
    training: bool = True,
    refuse: bool = True,
) -> ResolvedConfig:
    """Return `config`, with the largest microbatch that fits where it asks for `auto`.

    Where --recompute is `auto` on a GPU with room to spare, nothing is recomputed.

    Collective over `comm`. Raises the same ConfigError on every rank, with the way out, if the run
    needs more memory than a node or GPU has. Without `refuse` it returns the smallest microbatch.
    """
    judge = _Judge(config, comm, device, training)
    tried = [config]
    if config.options.pipeline.microbatch == "auto" and training:
        tried = list(_smaller(config))
    problems = judge.problems(tried)
    for candidate, problem in zip(tried, problems, strict=True):
        if problem is None:
            return _with_room(candidate, judge, device) if training else candidate
    if not refuse:
        return tried[-1]
    ways = _ways(config) if training else []
    found = [problem is None for problem in judge.problems([way for way, _ in ways])]
    fits = next((text for (_, text), ok in zip(ways, found, strict=True) if ok), None)
    raise ConfigError(f"{problems[-1]}; {fits or _last_resort(config, training)}")


def _with_room(config: ResolvedConfig, judge: _Judge, device: Device) -> ResolvedConfig:
    """Return `config` without recomputation where `auto` chose it and a GPU has the room.

    Collective. On the CPU `auto` stays: selective recomputation is the faster one there, by caches.
    """
    asked = config.options.pipeline.recompute
    if device.on_host or asked != "auto" or config.recompute == "none":
        return config
    whole = dataclasses.replace(config, recompute="none")
    return whole if judge.problems([whole], FULL_TAPE_SHARE) == [None] else config


def _last_resort(config: ResolvedConfig, training: bool) -> str:
    if not training:
        return "use more ranks with --tp or --pp, or another machine"
    sizes = [name for name in ("context", "vocab", "dim", "layers") if hasattr(config.model, name)]
    return (
        "no --microbatch fits, not even with --recompute full: use more ranks with --tp or --pp, "
        f"or a smaller {or_list(map(flag, sizes))}"
    )


def _smaller(config: ResolvedConfig) -> Iterator[ResolvedConfig]:
    """Yield `config` with every microbatch that divides its own, the largest first."""
    for number in reversed(divisors(config.microbatch)):
        yield with_microbatch(config, number)


def _ways(config: ResolvedConfig) -> list[tuple[ResolvedConfig, str]]:
    """Return changes that save memory and what to call them, those that cost least first."""
    wide = []
    if config.replication.shard_group != config.options.replication.shard_group:
        options = config.options.replace(shard_group=config.mesh.dp)
        found = dataclasses.replace(config, options=options)
        wide = [(found, f"use --shard-group {config.mesh.dp}, which shards over all nodes")]
    if config.options.output.save_async:
        options = config.options.replace(save_async=False)
        wide.append((dataclasses.replace(config, options=options), "leave --save-async out"))
    smaller = list(_smaller(config))[1:]
    auto = ", or --microbatch auto" if config.options.optimization.batch_tokens else ", or auto"
    full = [dataclasses.replace(other, recompute="full") for other in (config, *smaller)]
    return [
        *wide,
        *((other, f"use {_microbatch(other)}{auto}") for other in smaller),
        *((other, f"use --recompute full {_microbatch(other)}") for other in full),
    ]


def _microbatch(config: ResolvedConfig) -> str:
    """Return the flag that asks for the microbatch of `config`."""
    if config.options.optimization.batch_tokens:
        return f"--microbatch-tokens {config.microbatch * config.model.context}"
    return f"--microbatch {config.microbatch}"


class _Judge:
    """Comparison of candidates with the memory of all nodes. Collective over `comm`."""

    def __init__(
        self,
        config: ResolvedConfig,
        comm: Communicator,
        device: Device,
        training: bool,
    ) -> None:
        self.comm, self.training = comm, training
        node, limit = comm.split_by_node(), config.options.compute.memory
        self.free = device.available_bytes() if limit is None else int(limit * 1e9)
        has = "this machine" if device.on_host else device.describe()
        self.where = f"{has} has" if limit is None else f"--memory gives {has}"
        self.home = node.broadcast_json(comm.rank)
        self.serves = comm.rank >= config.mesh.num_ranks
        self.pp_rank = 0 if self.serves else config.mesh.coords(comm.rank)["pp"]
        schedule = SCHEDULES[config.options.pipeline.schedule](config.mesh.pp, 1)
        self.layout = layout_of(config, schedule.rank_of_stage)
        self.shared_by = 1
        if training and device.on_host and may_share(config.options.replication):
            replicas = max(1, min(config.mesh.dp, node.size // config.mesh.tp))
            self.shared_by = replicas if self._has_shared(config, replicas) else 1

    def _has_shared(self, config: ResolvedConfig, replicas: int) -> bool:
        """Return whether the shared memory of all nodes holds what `replicas` ranks would share."""
        kinds = self._need(config).kinds
        mine = kinds["gradients"] + (kinds["parameters"] + kinds["optimizer"]) // replicas
        needed: dict[int, int] = {}
        places = self.comm.gather_json([self.home, mine, free_shared_bytes()])
        for home, num_bytes, _ in places:
            needed[home] = needed.get(home, SPARE_BYTES) + num_bytes
        return all(needed[home] <= free for home, _, free in places)

    def _need(self, config: ResolvedConfig) -> Need:
        if self.serves:
            return predicted_server(config, self.layout)
        return predicted(
            config,
            self.layout,
            self.pp_rank,
            shared_by=self.shared_by,
            training=self.training,
        )

    def problems(
        self, candidates: Sequence[ResolvedConfig], share: float = 1.0
    ) -> list[str | None]:
        """Return for each candidate why it does not fit `share` of what is free, None if it does.

        The same on every rank.
        """
        needs = [self._need(candidate) for candidate in candidates]
        free = int(share * self.free)
        own = [self.home, self.where, free, [[need.new, need.kinds] for need in needs]]
        places: dict[tuple[int, str], list[tuple[int, list[Any]]]] = {}
        for home, where, free, found in self.comm.gather_json(own):
            places.setdefault((home, where), []).append((free, found))
        judged = (
            [_problem(ranks, at, where) for (_, where), ranks in places.items()]
            for at in range(len(candidates))
        )
        return [next(filter(None, found), None) for found in judged]


def _problem(ranks: list[tuple[int, list[Any]]], candidate: int, where: str) -> str | None:
    """Return why the ranks of one memory do not fit, None if they do."""
    free, needs = min(rank[0] for rank in ranks), [rank[1][candidate] for rank in ranks]
    needed = sum(new for new, _ in needs)
    if needed <= free:
        return None
    kinds = max((kinds for _, kinds in needs), key=lambda kinds: sum(kinds.values()))
    largest = sorted(kinds.items(), key=lambda kind: -kind[1])[:3]
    parts = ", ".join(f"{name} {size(value)}" for name, value in largest)
    each = f"{len(ranks)} ranks, each at most " if len(ranks) > 1 else ""
    return f"the run needs {size(needed)} of memory ({each}{parts}), but {where} {size(free)}"
