"""Options of data parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.record import Record, option


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
    node_shared: Literal["auto", "on", "off"] = option("auto", resumable=True)
    """Let the data-parallel ranks of a node hold one copy of the weights and reduce gradients in
    shared memory: auto (where possible)."""
