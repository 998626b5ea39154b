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
    on_failure: Literal["stop", "shrink", "respawn"] = option("stop", resumable=True)
    """Course after a rank is lost: end all ranks (stop), go on with fewer data-parallel replicas
    (shrink), or start a new process in its place (respawn); the last two need Open MPI under mpirun
    --with-ft ulfm."""
    buddy: bool = option(False, resumable=True)
    """Copy state that one rank alone holds to another rank, from which it is rebuilt after a loss;
    with --on-failure shrink or respawn."""
    buddy_every: int = option(1, at_least=1, resumable=True)
    """Steps from one copy of --buddy to the next; after a loss all ranks go back to the last."""
