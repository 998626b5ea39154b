"""Survival of a run: when ranks are lost, the others go on with the same step.

A rank changes its state only after all have agreed that each has its gradient (`Trainer.commit`).
An error of one rank's communication revokes all groups, so every survivor comes to one loop:

1. The world shrinks to the living.
2. Replicas of the mesh are formed anew, as many whole ones as the survivors can fill. A rank keeps
   its stage and its tensor-parallel shard if it can. Ranks beyond leave.
3. Weights and optimizer state come from the memory of ranks that hold them, at the newest step
   whose state is whole; otherwise from `fallback`, a checkpoint.
4. All agree that the state is in place. A further loss begins the loop again, from the same
   memory: the trainer before the loss is kept until then.

The global batch stays: its microbatches are dealt to fewer replicas, and the sequences of a step
are those of the uninterrupted run. Losses therefore equal that run's up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from minillm.base.errors import CommTimeout, PeerFailed, RanksLost
from minillm.checkpoint.peers import Held, held, newest
from minillm.comm.communicator import Communicator
from minillm.layout.mesh_shape import MeshShape
from minillm.training.resolve import ResolvedConfig, with_replicas
from minillm.training.trainer import Trainer

Make = Callable[[ResolvedConfig, Communicator, Callable[[], None]], Trainer]
"""Make the trainer of a configuration on a group, with its `commit`. Collective over the group."""


class Loss(NamedTuple):
    """Loss of ranks that a run has survived. Equal on all its ranks."""

    before: int  # ranks before it
    survivors: int
    mesh: MeshShape  # mesh from now on
    step: int  # completed steps that the state holds
    from_memory: bool  # False: the state came from the fallback


class NoReplicaLeft(Exception):
    """Survivors that cannot fill one replica; raised on each of them, in the group `world`."""

    def __init__(self, world: Communicator, states: dict[int, Held]) -> None:
        super().__init__()
        self.world, self.states = world, states


class Survivors:
    """The ranks of a run that live, and the trainer of this one.

    `make` makes a trainer with initial values. `fallback` fills one from a checkpoint and returns
    the completed steps; without one a run begins anew. `recovered` is called on every rank that
    goes on, after each loss, before the ranks agree that the recovery is complete: it may be
    called again for the same loss. Collective over `world`.
    """

    def __init__(
        self,
        world: Communicator,
        config: ResolvedConfig,
        make: Make,
        fallback: Callable[[Trainer], int] = lambda trainer: 0,
        recovered: Callable[[Survivors, Loss], None] = lambda survivors, loss: None,
    ) -> None:
        self.world, self.config = world, config
        self._make, self._fallback, self._recovered = make, fallback, recovered
        self.trainer = make(config, world, self.commit)

    def commit(self) -> None:
        """Return if all ranks come here. Raises RanksLost on every living one if some are lost."""
        if not self.world.unanimous():
            raise RanksLost("ranks were lost before this update, which no rank has applied")

    def run(self, work: Callable[[], None]) -> bool:
        """Call `work` until it comes to its end on all ranks; return False on a rank that leaves.

        After a loss `work` is called again, and goes on from `trainer.done` steps. Raises
        NoReplicaLeft if too few ranks are left.

        Any error may be the consequence of a loss: under Open MPI a collective of a dead rank may
        return arbitrary numbers instead of an error. It is raised if no rank is lost.
        """
        while True:
            error: Exception | None = None
            try:
                work()
                self.commit()
                return True
            except RanksLost:
                pass
            except CommTimeout:
                raise
            except Exception as found:
                error = found
                self.world.revoke()
                self.world.unanimous(False)
            if not self._recover(error):
                return False

    def _recover(self, error: Exception | None) -> bool:
        """Restore the state on the ranks that are left; return False if this one leaves.

        Raises `error` if no rank is lost.
        """
        before = self.world.size
        for _ in range(before):  # each time without a rank more
            self.world.revoke()
            world = self.world.shrink()
            self.world = world  # of all survivors, until they have agreed
            if world.size == before:
                raise error or PeerFailed("another rank has failed, although none has ended")
            try:
                restored, ok = self._restore(world, before), True
            except (CommTimeout, NoReplicaLeft):
                raise
            except Exception as found:
                error, before = found, world.size
                world.revoke()
                restored, ok = None, False
            if world.unanimous(ok):
                if restored is None:
                    return False
                self.world, self.config, self.trainer = restored
                return True
        raise error or PeerFailed("the ranks that are left cannot go on")

    def _restore(
        self, world: Communicator, before: int
    ) -> tuple[Communicator, ResolvedConfig, Trainer] | None:
        """Return the group, configuration and trainer of this rank; None if it leaves.

        Collective over `world`, the survivors. Raises PeerFailed if more ranks are lost meanwhile.
        """
        old, states = self.trainer, self._states()
        seats = [(pp, tp) for pp, tp in world.gather_json(_seat(old))]
        mesh, places = reseated(self.config.mesh, seats)
        if mesh is None:
            raise NoReplicaLeft(world, states)
        place, config = places[world.rank], with_replicas(self.config, mesh.dp)
        group = world.split(None if place is None else 0, place, world.name)
        trainer = None if group is None else self._make(config, group, self.commit)
        wanted, coords = ([], None) if trainer is None else (trainer.state(), trainer.mesh.coords)
        found = newest(world, states, wanted, mesh, coords)
        if group is None or trainer is None:
            return None
        if found is not None:
            trainer.load(found[1])
        step = self._fallback(trainer) if found is None else found[0]
        trainer.begun = trainer.done = step
        previous = self.world, self.config, self.trainer
        self.world, self.config, self.trainer = group, config, trainer
        try:
            self._recovered(self, Loss(before, world.size, mesh, step, found is not None))
        finally:
            self.world, self.config, self.trainer = previous
        return group, config, trainer

    def _states(self) -> dict[int, Held]:
        """Return what this rank holds in memory, by completed steps."""
        trainer = self.trainer
        if trainer.begun != trainer.done:  # amid an update, which waits for other ranks
            return {}
        mesh = trainer.mesh
        return {trainer.done: held(trainer.state(), mesh.shape, mesh.coords)}


def _seat(trainer: Trainer) -> tuple[int, int]:
    return trainer.mesh.coord("pp"), trainer.mesh.coord("tp")


def reseated(
    mesh: MeshShape, seats: Sequence[tuple[int, int]]
) -> tuple[MeshShape | None, list[int | None]]:
    """Return the mesh that survivors of `mesh` form, and the rank of each; None for one that goes.

    `seats[r]` is where survivor r was on (pp, tp). It stays there if a replica has room. There are
    as many replicas as fit, at most those of `mesh`; without one the mesh is None.
    """
    dp = min(mesh.dp, len(seats) // (mesh.pp * mesh.tp))
    if not dp:
        return None, [None] * len(seats)
    found = MeshShape(pp=mesh.pp, dp=dp, tp=mesh.tp)
    free = {
        (pp, tp): [found.rank({"pp": pp, "dp": replica, "tp": tp}) for replica in range(dp)]
        for pp in range(mesh.pp)
        for tp in range(mesh.tp)
    }
    places: list[int | None] = [free[seat].pop(0) if free[seat] else None for seat in seats]
    left = sorted(rank for ranks in free.values() for rank in ranks)
    for survivor, place in enumerate(places):
        if place is None and left:
            places[survivor] = left.pop(0)
    return found, places
