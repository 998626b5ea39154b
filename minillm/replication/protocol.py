"""Replication protocol: everything between a backward pass and the next forward pass.

A data-parallel method decides where parameters, gradients and optimizer state live (`memory`), how
gradients become their sum (`reduce`), which ranks agree on a step (`agreeing`), and how updated
parameters reach the other replicas (`update`). The pipeline runtime and the trainer call these
methods and know no more. A new method is one file with one subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from minillm.autograd.backward import BackwardObserver
from minillm.base.trace import Tracer
from minillm.comm.communicator import MAX, Communicator
from minillm.comm.mesh import Mesh
from minillm.comm.two_levels import Summing, TwoLevels, by_levels
from minillm.layout.placement import Layout
from minillm.params.state import StateTensor
from minillm.params.storage import FlatBuffers, FlatState, Memory


class Optimizer(Protocol):
    """Update rule over flat buffers."""

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share from the reduced gradient times `grad_scale`."""

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return the state by name, one entry a stage."""


MakeOptimizer = Callable[[Sequence[FlatBuffers]], Optimizer]
"""Make an optimizer of the values in flat buffers, one entry a stage."""


class Replication:
    """One copy of the model: nothing is reduced. Base class of the data-parallel methods.

    A run calls, in order: the constructor, `attach` with the buffers allocated in `memory`, and
    for each step `begin_step`, the schedule's actions (`unshard`, `reshard`, `reduce_ties`,
    `reduce`), `sum_of_squares` and `update`. All ranks make the same calls.
    """

    def __init__(self, mesh: Mesh, layout: Layout, memory: Memory) -> None:
        self.mesh, self.layout, self.memory = mesh, layout, memory
        self.exposed_seconds = 0.0
        """Seconds in reductions that backward did not hide, since the start."""
        self.buffers: Mapping[int, FlatBuffers] = {}
        self.sums: dict[str, Summing] = {}
        """Name of a group -> what all-reduces over it, in one level or in two."""

    @property
    def agreeing(self) -> Communicator:
        """The ranks that agree on loss, norm and stopping: all, a group, or this rank alone."""
        return self.mesh.world

    lockstep = True
    """False if workers take steps by themselves, and share weights only after `meet`."""

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Take over the buffers of this rank's stages (stage -> buffers). Collective."""
        self.buffers = buffers
        self._ties = {
            name: [
                parameter
                for stage in stages
                if stage in buffers
                for parameter in buffers[stage].parameters
                if parameter.spec.tie == name
            ]
            for name, stages in sorted(self.layout.ties.items())
        }

    def _sum_over(self, *groups: Communicator) -> None:
        """All-reduce over `groups` in two levels where nodes allow it. Collective over them."""
        self.sums = {comm.name: by_levels(comm) for comm in dict.fromkeys(groups)}
        found = next((s for s in self.sums.values() if isinstance(s, TwoLevels)), None)
        if found is not None:
            said = self.memory.description
            self.memory.description = "; ".join(filter(None, (said, found.describe())))

    @property
    def copies(self) -> Communicator:
        """The ranks that hold the same parameters as this one, and must agree on them."""
        return self.mesh.axis("dp")

    @property
    def replica(self) -> int:
        """Number of the replica that this rank computes with. The first one, 0, samples."""
        return self.mesh.coord("dp")

    @property
    def workers(self) -> tuple[int, int]:
        """Own index and number of the workers that each update by themselves.

        Each clips by its own norm and has optimizer state of its own. Usually all ranks are one.
        """
        return 0, 1

    def optimizer(self, make: MakeOptimizer) -> Optimizer:
        """Return the optimizer of this rank's share, made by `make` from flat buffers."""
        return make(list(self.buffers.values()))

    def state_bytes(self, optimizer: Optimizer) -> int:
        """Return the bytes of optimizer state that this rank keeps, and of what it serves."""
        states = optimizer.state().values()
        return sum(state.array.nbytes for each in states for state in each)

    def adopt(self) -> None:
        """Take the parameters that the model holds now for the agreed ones, on every replica."""

    def loaded(self) -> None:
        """Take the optimizer state and the state of the method that have been loaded. Collective.

        Runs after `adopt`.
        """

    def meet(self) -> None:
        """Give all replicas one set of weights, where they do not share them in every step.

        Runs before weights are evaluated, compared or saved. Collective.
        """

    def progress(self) -> None:
        """Serve other ranks. Called while this one is idle amid a computation."""

    def record(self, run: Path, tracer: Tracer | None) -> None:
        """Write what this rank serves to the folder of the run, and its spans to `tracer`."""

    def agreed(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds weights that all replicas agree on.

        Evaluation, samples and checkpoints take these. No step runs within it. Not collective.
        """
        return nullcontext()

    def observer(self, stage: int, last: bool) -> BackwardObserver | None:
        """Return the observer of a backward pass of `stage`, None if nothing overlaps.

        `last`: no other microbatch adds to the stage's gradients in this step.
        """
        return None

    def begin_step(self) -> None:
        """Discard last step's gradients."""
        for buffers in self.buffers.values():
            buffers.start_step()

    @property
    def sharded(self) -> bool:
        """True if parameters are gathered for use: schedules then hold UNSHARD and RESHARD."""
        return "values" in self.memory.shards

    def unshard(self, stage: int, way: str, then: str | None) -> None:
        """Begin to gather the parameters of `stage` for a pass, F forward or B backward.

        `then` is the way of the next pass, None if `reshard` comes first.
        """

    def reshard(self, stage: int) -> None:
        """Release what is gathered of `stage`."""

    def reduce_ties(self) -> None:
        """Sum the gradients of each tied weight over all its copies, on this rank and on others.

        Runs before `reduce`. Collective over the ranks that hold a copy.
        """
        for name, copies in self._ties.items():
            if not copies:
                continue
            slots = [parameter.slot() for parameter in copies]
            for slot in slots:
                slot.finish()
            total = slots[0].buf
            for other in slots[1:]:
                total += other.buf
            group = self.mesh.tie(name)
            if group is not None and group.size > 1:
                group.all_reduce_(total)
            for slot in slots:
                if slot is not slots[0]:
                    slot.buf[...] = total
                slot.writes += 1

    def reduce(self, stage: int) -> None:
        """Return once the gradients of `stage` are summed over the replicas.

        The gradient of a parameter that no microbatch used is zero.
        """
        for slot in self.buffers[stage].slots:
            slot.finish()

    def sum_of_squares(self) -> Any:
        """Return this rank's part of the squared gradient norm of the whole model.

        Added over all ranks, every parameter counts once.
        """
        raise TypeError(f"{type(self).__name__} does not define sum_of_squares")

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        """Update this rank's share of the parameters, then publish them to the replicas."""
        optimizer.step(step, lr, scale)
        self.memory.sync()

    def conclude(self, numbers: Sequence[float]) -> list[float]:
        """End the step: return the largest of each of a few numbers over all ranks.

        All ranks get the same for the same step. Collective over `agreeing`.
        """
        return self.agreeing.reduce_numbers(numbers, MAX)

    def metrics(self) -> dict[str, float]:
        """Return what the method adds to this step's line in metrics.jsonl."""
        return {}

    def state(self) -> Iterator[StateTensor]:
        """Yield what a resumed run needs besides weights and optimizer state."""
        return iter(())

    def own_state(self, optimizer: Iterable[StateTensor]) -> Iterator[StateTensor]:
        """Yield this replica's own version of the tensors of the optimizer, where they differ."""
        return iter(())


ReplicationFactory = Callable[[Mesh, Layout, int], Replication]
"""Make a method from the mesh, the layout and the number of parameters on this rank. Collective."""
