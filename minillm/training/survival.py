"""Survival of a run: when ranks are lost, the others go on with the same step.

A rank changes its state only after all have agreed that each has its gradient (`Trainer.commit`).
An error of one rank's communication revokes all groups, so every survivor comes to one loop:

1. The world shrinks to the living. With `Respawn` new ranks take the places of the lost.
2. Replicas of the mesh are formed anew, as many whole ones as the survivors can fill. A rank keeps
   its stage and its tensor-parallel shard if it can. Ranks beyond leave.
3. Weights and optimizer state come from the memory of ranks that hold them, at the newest step
   whose state is whole; otherwise from `fallback`, a checkpoint.
4. All agree that the state is in place. A further loss begins the loop again, from the same
   memory: the trainer before the loss is kept until then.

The global batch stays: its microbatches are dealt to fewer replicas, and the sequences of a step
are those of the uninterrupted run. Losses therefore equal that run's up to rounding, and to the bit
on the same mesh.

A new rank is a member of the group before it knows anything. The survivors agree that all of them
have this group, and from then on it is shrunk like any other. A new rank whose group fails before
the survivors have told it about the run ends (`welcomed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minillm.base.errors import CommTimeout, PeerFailed, RanksLost
from minillm.checkpoint.peers import Held, held, newest
from minillm.comm.communicator import Communicator
from minillm.comm.survivable import NotAdmitted
from minillm.layout.mesh_shape import MeshShape
from minillm.training.buddies import Buddies, merged
from minillm.training.resolve import ResolvedConfig, goes_on, with_replicas
from minillm.training.trainer import Trainer

Make = Callable[[ResolvedConfig, Communicator, Callable[[], None]], Trainer]
"""Make the trainer of a configuration on a group, with its `commit`. Collective over the group."""


RESPAWNS = 3  # without a further step: ranks that die again and again are not replaced for ever


class Loss(NamedTuple):
    """Loss of ranks that a run has survived. Equal on all its ranks, but for `reason`."""

    before: int  # ranks before it
    survivors: int
    mesh: MeshShape  # mesh from now on
    step: int  # completed steps that the state holds
    from_memory: bool  # False: the state came from the fallback
    respawned: int = 0  # new ranks in the places of lost ones
    reason: str = ""  # why there is none, where new ranks were asked for


class Welcome(NamedTuple):
    """State of a run that a new rank must know, as JSON from the first survivor."""

    dp: int  # replicas before the loss
    tried: tuple[int, int]  # step, and respawns since without a further one
    run: Any  # see `Respawn.context`


class Respawn(NamedTuple):
    """Start of new ranks in the places of lost ones."""

    command: Sequence[str] = ()  # of a new process
    context: Callable[[], Any] = lambda: None  # JSON for a new rank
    welcome: Welcome | None = None  # of a rank that is new itself


def welcomed(world: Communicator) -> Welcome:
    """Return what the survivors tell a new rank. Collective over its group.

    Raises NotAdmitted if the group fails: the survivors go on without this rank.
    """
    try:
        found = next(entry for entry in world.gather_json(None) if entry is not None)
        dp, tried, run = found
    except CommTimeout:
        raise
    except Exception as error:
        raise NotAdmitted(str(error)) from None
    return Welcome(dp, tuple(tried), run)


class NoReplicaLeft(Exception):
    """Survivors that cannot fill one replica; raised on each of them, in the group `world`.

    `tells` is True on one of them: the first that was not started in the place of another, because
    the launcher waits for those of the start alone. `states` are those of this rank, by completed
    steps. `names` are all tensors of a state; none where ranks have no buddies, because a part of
    the state is then lost for sure.
    """

    def __init__(
        self, world: Communicator, tells: bool, states: dict[int, Held], names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.world, self.tells, self.states, self.names = world, tells, states, names


class Survivors:
    """The ranks of a run that live, and the trainer of this one.

    `make` makes a trainer with initial values. `fallback` fills one from a checkpoint and returns
    the completed steps; without one a run begins anew. `recovered` is called on every rank that
    goes on, after each loss, before the ranks agree that the recovery is complete: it may be
    called again for the same loss. `respawn` replaces lost ranks; None: the mesh shrinks. A rank
    that is new itself has a trainer once `run` has joined the others. With `buddy_every` ranks copy
    state that has no replica to each other, every so many steps. Collective over `world`.
    """

    def __init__(
        self,
        world: Communicator,
        config: ResolvedConfig,
        make: Make,
        fallback: Callable[[Trainer], int] = lambda trainer: 0,
        recovered: Callable[[Survivors, Loss], None] = lambda survivors, loss: None,
        respawn: Respawn | None = None,
        buddy_every: int = 0,
    ) -> None:
        self.world, self.config = world, config
        self._make, self._fallback, self._recovered = make, fallback, recovered
        self._respawn, welcome = respawn, respawn.welcome if respawn else None
        self._place = world.rank  # on the mesh of `config`
        self._tried = (-1, 0) if welcome is None else welcome.tried
        self._spawned = self._is_new = welcome is not None
        self._welcome: tuple[Welcome | None] | None = None  # to tell new ranks first
        self._reason = ""
        self._trainer = None if welcome else make(config, world, self.commit)
        self._buddy_every = buddy_every
        self.buddies = self._copies(self._trainer)

    @property
    def trainer(self) -> Trainer:
        """The trainer of this rank."""
        assert self._trainer is not None, "a new rank has no trainer before it has joined"
        return self._trainer

    def commit(self) -> None:
        """Return if all ranks come here. Raises RanksLost on every living one if some are lost."""
        if not self.world.unanimous():
            raise RanksLost("ranks were lost before this update, which no rank has applied")
        if self.buddies is not None:
            self.buddies.commit()

    def keep(self) -> None:
        """Copy the state of this rank if a copy is due. To be called before each step. Collective.

        Raises PeerFailed if a rank is lost.
        """
        if self.buddies is not None:
            self.buddies.keep(self.trainer.done)

    def _copies(self, trainer: Trainer | None) -> Buddies | None:
        """Return the copies of the state of a new trainer. Collective over its ranks."""
        if trainer is None or not self._buddy_every:
            return None
        return Buddies(trainer, self._buddy_every)

    def run(self, work: Callable[[], None]) -> bool:
        """Call `work` until it comes to its end on all ranks; return False on a rank that leaves.

        After a loss `work` is called again, and goes on from `trainer.done` steps. Raises
        NoReplicaLeft if too few ranks are left.

        Any error may be the consequence of a loss: under Open MPI a collective of a dead rank may
        return arbitrary numbers instead of an error. It is raised if no rank is lost.
        """
        if self._trainer is None and not self._joined():
            return False
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

    def _joined(self) -> bool:
        """Join the recovery of the others on a new rank; return False if it leaves."""
        stays, error = self._settled()
        return self._recover(error) if stays is None else stays

    def _recover(self, error: Exception | None) -> bool:
        """Restore the state on the ranks that are left; return False if this one leaves.

        Raises `error` if no rank is lost.
        """
        while True:  # each time after a further loss; `RESPAWNS` bounds those of new ranks
            before = self.world.size
            self.world.revoke()
            self.world = self.world.shrink()
            if self.world.size == before:
                raise error or PeerFailed("another rank has failed, although none has ended")
            self.world = self._refilled(self.world)
            stays, error = self._settled()
            if stays is not None:
                return stays

    def _refilled(self, world: Communicator) -> Communicator:
        """Return `world` with new ranks in the places of lost ones, or as it is.

        Collective over `world`. All its ranks get the same.
        """
        self._reason, self._welcome, group = "", None, None
        if self._respawn is None:
            return world
        try:
            done = -1 if self._trainer is None else self._trainer.done
            everyone = world.gather_json([self._place, done, *self._tried])
            places, step = [place for place, *_ in everyone], max(done for _, done, *_ in everyone)
            at, tries = max((at, number) for *_, at, number in everyone)
            tries = 0 if step > at else tries
            if tries < RESPAWNS:
                self._tried, dp = (max(step, at), tries + 1), self.config.mesh.dp
                group = world.respawn(places, self.config.mesh.num_ranks, self._respawn.command)
                first = self._place == min(places)
                tells = Welcome(dp, self._tried, self._respawn.context()) if first else None
                self._welcome = (tells,)
            else:
                self._reason = f"ranks were lost {tries} times without a further step"
        except CommTimeout:
            raise
        except Exception as error:
            self._reason = f"no new rank could be started ({error})"
        if world.unanimous(self._welcome is not None):
            assert group is not None
            return group
        if group is not None:
            group.revoke()
        return world

    def _settled(self) -> tuple[bool | None, Exception | None]:
        """Return whether this rank stays, once all ranks of the world have restored their state.

        None if they have not, with this rank's error if it has one. Collective over the world.
        """
        error: Exception | None = None
        world, restored = self.world, None
        try:
            restored = self._restore(world)
        except (CommTimeout, NoReplicaLeft):
            raise
        except Exception as found:
            error = found
            world.revoke()
        if not world.unanimous(error is None):
            return None, error
        if restored is None:
            return False, None
        self.world, self.config, self._trainer, self.buddies = restored
        if self.buddies is not None:
            self.buddies.commit()
        self._place, self._is_new = self.world.rank, False
        return True, None

    def _restore(
        self, world: Communicator
    ) -> tuple[Communicator, ResolvedConfig, Trainer, Buddies | None] | None:
        """Return the group, configuration, trainer and copies of this rank; None if it leaves.

        Collective over `world`. Raises PeerFailed if more ranks are lost meanwhile.
        """
        if self._welcome is not None:
            world.gather_json(self._welcome[0])
            self._welcome = None
        states, old = self._states(), self.config.mesh
        everyone = world.gather_json([self._place, self._is_new, self._spawned])
        seats = [_seat(old, place) for place, *_ in everyone]
        new = sum(is_new for _, is_new, _ in everyone)
        mesh, places = reseated(old, seats, lambda dp: goes_on(self.config, dp))
        if mesh is None:
            started = [rank for rank, (*_, spawned) in enumerate(everyone) if not spawned]
            names = self.buddies.names if self.buddies else ()
            raise NoReplicaLeft(world, world.rank == min(started, default=0), states, names)
        place = places[world.rank]
        config = self.config if mesh == old else with_replicas(self.config, mesh.dp)
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
        previous = self.world, self.config, self._trainer
        self.world, self.config, self._trainer = group, config, trainer
        loss = Loss(
            old.num_ranks, world.size - new, mesh, step, found is not None, new, self._reason
        )
        try:
            self._recovered(self, loss)
        finally:
            self.world, self.config, self._trainer = previous
        buddies = self._copies(trainer)
        if buddies is not None:
            buddies.keep(step)
        return group, config, trainer, buddies

    def _states(self) -> dict[int, Held]:
        """Return what this rank holds in memory, by completed steps: in use, and of buddies."""
        trainer, found = self._trainer, self.buddies.states() if self.buddies else []
        # None on a new rank; or amid an update, which waits for other ranks.
        if trainer is not None and trainer.begun == trainer.done:
            mesh = trainer.mesh
            found.append((trainer.done, held(trainer.state(), mesh.shape, mesh.coords)))
        return merged(found)


def _seat(mesh: MeshShape, place: int) -> tuple[int, int]:
    coords = mesh.coords(place)
    return coords["pp"], coords["tp"]


def reseated(
    mesh: MeshShape, seats: Sequence[tuple[int, int]], fits: Callable[[int], bool] = bool
) -> tuple[MeshShape | None, list[int | None]]:
    """Return the mesh that survivors of `mesh` form, and the rank of each; None for one that goes.

    `seats[r]` is where survivor r was on (pp, tp). It stays there if a replica has room. There are
    as many replicas as there are ranks for, and as `fits`, at most those of `mesh`; without one the
    mesh is None.
    """
    most = min(mesh.dp, len(seats) // (mesh.pp * mesh.tp))
    dp = next((number for number in range(most, 0, -1) if fits(number)), 0)
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
