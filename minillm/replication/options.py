"""Options of data parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.record import Record, option


@dataclass(frozen=True, kw_only=True)
class ReplicationOptions(Record):
    """Data parallelism."""

    bucket_mb: float = option(4.0, above=0, resumable=True)
    """Size in MB (10^6 bytes) of the pieces in which gradients are reduced while backward still
    runs."""
    node_shared: Literal["auto", "on", "off"] = option("auto", resumable=True)
    """Let the data-parallel ranks of a node hold one copy of the weights and reduce gradients in
    shared memory: auto (where possible)."""
