"""Options of the communication between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.record import Record, option
from minillm.comm.communicator import DEFAULT_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class CommOptions(Record):
    """Communication, as in `--comm-timeout 600` (docs/architecture.md)."""

    check_order: bool = option(False, resumable=True)
    """Compare the order of communications between ranks, to find a mismatch; slow."""
    comm_timeout: float = option(DEFAULT_TIMEOUT, above=0, resumable=True)
    """Seconds to wait for another rank that neither answers nor works alone, before giving up."""
    on_failure: Literal["stop", "shrink"] = option("stop", resumable=True)
    """Course after a rank is lost: end all ranks (stop), or go on with fewer data-parallel replicas
    (shrink: Open MPI under mpirun --with-ft ulfm)."""
