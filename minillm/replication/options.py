"""Options of data parallelism."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option

MOST_SLOWDOWN = 1000


@dataclass(frozen=True, kw_only=True)
class ReplicationOptions(Record):
    """Data parallelism, as in `--node-shared off --bucket-mb 1` (docs/parallel.md)."""

    bucket_mb: float = option(4.0, above=0, resumable=True)
    """Size in MB (10^6 bytes) of the pieces in which gradients are reduced while backward still
    runs."""
    zero: int = option(0, at_least=0, below=4, resumable=True)
    """Stage of ZeRO: cut optimizer state (1), gradients (2) and parameters (3) over the
    data-parallel ranks. 0: every rank holds all of them."""
    shard_group: int = option(0, at_least=0, resumable=True)
    """Number of data-parallel ranks that share a replica under --zero; 0: those of a node where
    several nodes run, else all of them."""
    compress: Literal["none", "bf16", "powersgd", "topk", "onebit"] = option("none", announced=True)
    """Send gradients compressed: as bfloat16, as factors of low rank (powersgd), the largest
    elements (topk), or signs and a scale (onebit). The last three remember what they left out."""
    compress_rank: int = option(4, at_least=1, announced=True)
    """Rank of the factors under --compress powersgd."""
    compress_share: float = option(0.01, above=0, below=1, announced=True)
    """Share of the elements that --compress topk sends."""
    local_steps: int = option(0, at_least=0, announced=True)
    """Let every data-parallel worker train alone for this many steps, then average the weights. 0:
    sum gradients in every step."""
    outer_lr: float = option(0.7, above=0, announced=True)
    """Rate of the outer update under --local-steps: 1 without momentum takes the average."""
    outer_momentum: float = option(0.9, at_least=0, below=1, announced=True)
    """Nesterov momentum of the outer update under --local-steps."""
    fragments: int = option(1, at_least=1, announced=True)
    """Parts of the model that --local-steps averages in turn, equally many steps apart."""
    balance: Literal["none", "speed"] = option("none", resumable=True)
    """Deal the microbatches of a step to the data-parallel replicas evenly (none), or by their
    measured speed."""
    server: Literal["none", "sync", "async", "stale"] = option("none", announced=True)
    """Keep weights and optimizer state on parameter servers, which update once from the sum of all
    workers (sync) or at the gradient of each (async; stale, where no worker is far ahead)."""
    servers: int = option(0, at_least=0, resumable=True)
    """Ranks that serve under --server, besides the data-parallel ones; 0: every worker serves a
    share."""
    staleness: int = option(1, at_least=0, announced=True)
    """Steps by which a worker may be ahead of the slowest one under --server stale."""
    slow_rank: str | None = option(None, resumable=True)
    """Make a rank's computation slower by a factor, as in 1:3 for rank 1 and factor 3."""
    node_shared: Literal["auto", "on", "off"] = option("auto", resumable=True)
    """Let the data-parallel ranks of a node hold one copy of the weights and reduce gradients in
    shared memory: auto (where possible)."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a --slow-rank that cannot be read."""
        super().__post_init__()
        if self.slow_rank is not None:
            found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,6}(?:\.[0-9]{1,6})?)", self.slow_rank)
            if found is None or not 1 <= float(found[2]) <= MOST_SLOWDOWN:
                raise ConfigError(
                    f"--slow-rank {self.slow_rank[:60]!r} must be a rank and a factor from 1 to "
                    f"{MOST_SLOWDOWN}, as in 1:3"
                )

    @property
    def slow(self) -> tuple[int, float]:
        """The rank that --slow-rank names, and its factor; rank 0 and 1 without one."""
        rank, factor = (self.slow_rank or "0:1").split(":")
        return int(rank), float(factor)

    @property
    def num_servers(self) -> int:
        """Dedicated server ranks, behind those of the mesh."""
        return self.servers if self.server != "none" else 0
