"""Operations that outlive a lost rank: agreement of the living, revocation, and their new group.

They follow User Level Failure Mitigation (Bland et al. 2013, ULFM of Open MPI). An operation that
needs a dead rank raises PeerFailed on the ranks that wait for it, and on no others. A rank that has
seen the error therefore does three things, in this order:

1. `revoke` ends the waits of the other ranks in its groups: they raise PeerFailed as well.
2. `unanimous(False)` meets the ranks that have seen no error in their next `unanimous(True)`.
   Every living rank gets False.
3. `shrink` returns the group of the living.
4. `respawn` starts new ranks in the places of the dead. It fails on some ranks and not on others if
   a further rank dies meanwhile, so `unanimous` follows.

Invariant: all ranks call `unanimous` and `shrink` of a group in the same order. These two work in a
revoked group and pass over the dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillm.comm.transport import Transport

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator


class NotAdmitted(Exception):
    """End of a new rank whose group has failed before it knew what to do there."""


class Survivable(Transport):
    """Transport whose living ranks can go on without the dead ones."""

    def check_survivable(self) -> None:
        """Raise ConfigError with the reason if the death of a rank ends all others here."""

    def unanimous(self, ok: bool = True) -> bool:
        """Return True if every rank lives and passes True; all living ranks get the same answer.

        Collective over the living. Raises PeerFailed if a rank ends the whole program.
        """
        raise self._unsupported("unanimous")

    def revoke(self) -> None:
        """End every operation in the groups of this rank: on all their ranks they raise PeerFailed.

        Not collective; a second call is a no-op.
        """
        raise self._unsupported("revoke")

    def shrink(self) -> Communicator:
        """Return the group of the living ranks, in the same order. Collective over the living."""
        raise self._unsupported("shrink")

    def respawn(
        self, places: Sequence[int], size: int, command: Sequence[str] = ()
    ) -> Communicator:
        """Return a group of `size` ranks: rank r of this group in places[r], new ones elsewhere.

        `command` starts a new process; a thread runs `joining` of its `run_ranks` instead.
        Collective over this group, which is not revoked. Raises an error where nothing can be
        started. The new ranks have a group as well; it is theirs to end when it fails.
        """
        raise self._unsupported("respawn")
