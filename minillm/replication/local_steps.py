"""Local steps: workers that train alone and average their weights every H steps.

Between two synchronisations no gradient crosses the data axis. Each worker clips by its own norm
and updates with its own optimizer state, which is never averaged or reset. Every H-th step all
workers take the agreed weights, theta (Stich 2019, arXiv:1805.09767; DiLoCo, Douillard et al.
2023, arXiv:2311.08105, with Nesterov momentum outside):

    D     = theta - mean of the workers' weights
    buf   = momentum * buf + D
    theta = theta - lr * (D + momentum * buf)

Losses are divided by the global count before backward starts, so a worker's gradient is 1 / d of
the gradient of its own mean loss. Its update and norm therefore take d times that gradient.

With F fragments, the workers agree on a part of the model every H / F steps, and on each part
every H steps (streaming DiLoCo, Douillard et al. 2025, arXiv:2501.18512, without its delay). That
sends as much, with a peak of one fragment. Block b of the model is in fragment (b + 1) mod F, the
parameters outside the blocks are in fragment 0.

Invariant: step s (from 0) synchronises fragment f if s + 1 - (f + 1) H / F is a multiple of H. No
counter is kept, so none can be wrong after a resume. Weights are averaged in the order of the
buffer, so all copies of a tied or replicated weight keep the same bits.

The agreed weights, those of each fragment's last synchronisation, are evaluated, sampled and saved.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.arrays import Array, to_host
from minillm.base.errors import ConfigError
from minillm.comm.mesh import Mesh
from minillm.layout.flat import FlatLayout, P
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.placement import Layout
from minillm.layout.sharding import Segment, ShardSpec
from minillm.params.state import StateTensor
from minillm.params.storage import FlatBuffers, FlatState, PrivateMemory
from minillm.replication.all_reduce import counted_grads
from minillm.replication.costs import Bytes, DataAxis, Held, Sizes, add_sum
from minillm.replication.gather import unit_of
from minillm.replication.method import Extent, Method, Setting, saved, whole
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Optimizer, Replication

CHUNK = 1 << 18  # elements of the outer update at once: its temporary array stays in the cache
WHOLE = (slice(None),)
NO_WORKERS = (
    "every worker begins from the agreed weights and the saved optimizer state: the checkpoint has "
    "none of its own for this number of workers"
)
NO_MOMENTUM = "the outer momentum begins at zero: the checkpoint has none"


def fragment_of(name: str, number: int) -> int:
    """Return the fragment, of `number`, of a parameter; the same for all copies of a tied one."""
    block = re.search(r"\d+$", unit_of(name))
    return (int(block.group()) + 1) % number if block else 0


def fragments_of(layout: FlatLayout[P], number: int) -> list[list[slice]]:
    """Return the slices of the flat buffer that make each fragment, in its order."""
    found: list[list[slice]] = [[] for _ in range(number)]
    for run in layout.runs:
        for fragment, members in itertools.groupby(
            run.spans, lambda span: fragment_of(span.parameter.name, number)
        ):
            spans = list(members)
            found[fragment].append(slice(spans[0].start, spans[-1].stop))
    return found


def due_fragment(step: int, every: int, number: int) -> int | None:
    """Return the fragment that step `step` (from 0) synchronises, None if it is a local one."""
    turn, rest = divmod(step + 1, every // number)
    return (turn - 1) % number if rest == 0 else None


class Worker:
    """Second set of weights of one stage, outer momentum, and their exchange with the model."""

    def __init__(self, buffers: FlatBuffers) -> None:
        self.buffers = buffers
        self.held = buffers.values if buffers.masters is None else buffers.masters
        """The weights that the model computes with and the optimizer updates."""
        self.other = buffers.memory.own(self.held.size, self.held.dtype)
        """The agreed weights; the worker's own while the model holds the agreed ones."""
        self.momentum = buffers.memory.own(self.held.size, self.held.dtype)

    def swap(self) -> None:
        """Exchange the two sets of weights."""
        for held, other in self._chunks(self.held, self.other):
            kept = held.copy()
            held[...] = other
            other[...] = kept
        self._round()

    def outer_step(
        self, num_workers: int, lr: float, momentum: float, parts: Sequence[slice] = WHOLE
    ) -> None:
        """Update the agreed weights from the sum of the workers' weights, which the model holds.

        `parts` are slices of the flat buffer.
        """
        arrays = self.held, self.other, self.momentum
        for held, theta, buf in itertools.chain.from_iterable(
            self._chunks(*(array[part] for array in arrays)) for part in parts
        ):
            held *= 1 / num_workers
            outer_grad = theta - held
            buf *= momentum
            buf += outer_grad
            outer_grad += momentum * buf
            outer_grad *= lr
            theta -= outer_grad
            held[...] = theta
        self._round()

    def _round(self) -> None:
        """Round the model's narrow weights from their masters."""
        if self.buffers.masters is not None:
            values = self.buffers.values
            kernels.cast(self.buffers.masters, values.dtype, out=values)

    def _chunks(self, *arrays: Array) -> Iterator[tuple[Array, ...]]:
        for start in range(0, arrays[0].size, CHUNK):
            yield tuple(array[start : start + CHUNK] for array in arrays)


class LocalSteps(Replication):
    """Workers along dp that average their weights every `every` steps.

    The other axes work within a replica as usual: partial sums and tied weights are reduced in
    every step.
    """

    def __init__(
        self,
        mesh: Mesh,
        layout: Layout,
        memory: PrivateMemory,
        every: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        num_fragments: int = 1,
    ) -> None:
        super().__init__(mesh, layout, memory)
        self.every, self.lr, self.momentum = every, lr, momentum
        self.num_workers, self.num_fragments = mesh.size("dp"), num_fragments
        self._sum_over(mesh.axis("dp"))

    @property
    def workers(self) -> tuple[int, int]:
        """The worker of this rank, and their number."""
        return self.mesh.coord("dp"), self.num_workers

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Allocate the agreed weights and the outer momentum."""
        super().attach(buffers)
        self._workers = {stage: Worker(b) for stage, b in buffers.items()}
        self._fragments = {
            stage: fragments_of(b.layout, self.num_fragments) for stage, b in buffers.items()
        }
        self._counted = counted_grads(buffers, self.layout, {**self.mesh.coords, "dp": 0})
        self.adopt()

    def adopt(self) -> None:
        """Take the weights of the model for both sets, the agreed ones and this worker's own."""
        for worker in self._workers.values():
            worker.other[...] = worker.held

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let the model hold the agreed weights. Not collective."""
        for worker in self._workers.values():
            worker.swap()
        try:
            yield
        finally:
            for worker in self._workers.values():
                worker.swap()

    def reduce(self, stage: int) -> None:
        """Sum the partial gradients of the stage within the replica."""
        super().reduce(stage)
        started, buffers = time.perf_counter(), self.buffers[stage]
        for run in buffers.layout.runs:
            for axis in run.sum_axes:
                if axis != "dp":
                    self.mesh.axis(axis).all_reduce_(buffers.grads[run.start : run.stop])
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> Any:
        """Return this rank's part of the squared norm of its worker's gradient."""
        return self.num_workers**2 * sum(map(kernels.sum_of_squares, self._counted))

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        """Update this worker's weights, and average the fragment that is due. Collective then.

        On a GPU, a synchronisation waits for the verdict on the step.
        """
        super().update(optimizer, step, lr, scale * self.num_workers)
        fragment = due_fragment(step, self.every, self.num_fragments)
        if fragment is not None and np.isfinite(to_host(scale)).all():
            self._synchronise(fragment)

    def _synchronise(self, fragment: int) -> None:
        started, sums = time.perf_counter(), self.sums[self.mesh.axis("dp").name]
        for stage, worker in self._workers.items():
            parts = self._fragments[stage][fragment]
            for part in parts:
                sums.all_reduce_(worker.held[part])
            worker.outer_step(self.num_workers, self.lr, self.momentum, parts)
        self.exposed_seconds += time.perf_counter() - started

    def state(self) -> Iterator[StateTensor]:
        """Yield the outer momentum and every worker's weights, within `agreed`.

        The worker's are named by its number and cut like the parameter, so they resume on any tp
        and pp with the same number of workers.
        """
        for stage, worker in self._workers.items():
            for array, kind in ((worker.momentum, "momentum"), (worker.other, "weights")):
                for parameter, spec, data in FlatState(worker.buffers, array).tensors():
                    owned = self.layout.owns(stage, parameter.spec.tie)
                    name = f"local/{kind}/{parameter.name}"
                    tensor = StateTensor(name, spec, data, owned=owned, fallback=NO_MOMENTUM)
                    yield tensor if kind == "momentum" else self._of_worker(tensor, name)

    def own_state(self, optimizer: Iterable[StateTensor]) -> Iterator[StateTensor]:
        """Yield every worker's optimizer state. Masters are the weights that `state` yields."""
        for tensor in optimizer:
            if not tensor.name.startswith("optimizer/master/"):
                yield self._of_worker(tensor, f"local/{tensor.name}")

    def _of_worker(self, tensor: StateTensor, name: str) -> StateTensor:
        """Return `tensor` as this worker's row of an array with one row for each worker."""
        spec = tensor.spec
        assert isinstance(spec, ShardSpec)
        workers = (Segment(self.num_workers, ("dp",)),)
        rows = ShardSpec((self.num_workers, *spec.shape), (workers, *spec.dims), pad=spec.pad)
        return StateTensor(name, rows, tensor.data[None], owned=tensor.owned, fallback=NO_WORKERS)


def _make(setting: Setting) -> LocalSteps:
    options = setting.options
    every, lr, momentum = options.local_steps, options.outer_lr, options.outer_momentum
    steps, number = "every step" if every == 1 else f"every {every} steps", options.fragments
    parts = f", in {number} fragments {every // number} apart" if number > 1 else ""
    words = (
        f"weights averaged {steps}{parts} (outer rate {lr:g}, momentum {momentum:g}), so the "
        "result depends on dp"
    )
    memory = PrivateMemory(words, setting.device)
    return LocalSteps(setting.mesh, setting.layout, memory, every, lr, momentum, number)


def _sends(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Return the bytes of one average: every weight of the fragment whose turn it is."""
    found = Bytes()
    for part in fragments_of(layout, axis.options.fragments)[axis.turn]:
        add_sum(found, axis, ("dp",), part.stop - part.start)
    return found


def _holds(sizes: Sizes, options: ReplicationOptions) -> Held:
    """Return the bytes of a whole replica, the agreed weights and the outer momentum."""
    held = whole(sizes, options)
    return held._replace(state=held.state + 2 * sizes.values * sizes.wide)


def _saves(sizes: Sizes, options: ReplicationOptions) -> int:
    """Return the bytes of the worker's weights and optimizer state, and its part of the others.

    The first worker writes its optimizer state twice: as its own, and for other methods.
    """
    own = (2 * sizes.state + sizes.values) * sizes.wide
    return own + saved(sizes._replace(state=sizes.values), options)


def _check(options: ReplicationOptions, mesh: MeshShape, steps: int) -> None:
    """Raise ConfigError for fragments without turns, and steps that would never be averaged."""
    every, number = options.local_steps, options.fragments
    if every % number:
        fitting = ", ".join(str(n) for n in range(1, every + 1) if every % n == 0)
        raise ConfigError(
            f"--fragments {number} does not divide --local-steps {every}, so they cannot take "
            f"turns; choose one of {fitting}"
        )
    if rest := steps % every:
        raise ConfigError(
            f"--steps {steps} is not a multiple of --local-steps {every}: the last {rest} "
            f"would never be averaged; use --steps {steps - rest + every}"
        )


def _key(options: ReplicationOptions) -> dict[str, Any]:
    """Return when what is averaged, on the workers of the mesh."""
    fragments = {"fragments": options.fragments} if options.fragments > 1 else {}
    return {"local_steps": options.local_steps} | fragments


def _fitting(extent: Extent) -> int:
    """Return a number of steps between two averages that divides all steps: 5 at most."""
    return next(every for every in range(5, 0, -1) if extent.steps % every == 0)


METHOD = Method(
    name="local-steps",
    option="local_steps",
    lost=lambda options: "a lost worker takes its own weights and optimizer state along",
    unskippable=lambda options: "each worker has a norm of its own, and updates by it",
    make=_make,
    sends=_sends,
    holds=_holds,
    saves=_saves,
    every=lambda options: options.local_steps // options.fragments,
    turns=lambda options: options.fragments,
    key=_key,
    workers=lambda options, dp: dp,
    equals_one_rank=lambda options, mesh: False,  # another model on every number of workers
    check=_check,
    needs=dict.fromkeys(("outer_lr", "outer_momentum", "fragments"), "--local-steps"),
    compared={"local": {"local_steps": _fitting, "outer_lr": 1.0, "outer_momentum": 0.0}},
)
