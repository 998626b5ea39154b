"""Data parallelism by all-reduce: each rank has its sequences, all get the sum of gradients.

Gradients lie in flat buffers, cut into buckets of about `bucket_bytes` in the order in which the
backward pass completes them. A bucket's all-reduce starts as soon as its last gradient is written,
while backward continues (Li et al. 2020, arXiv:2006.15704).

Invariant: buckets are fixed by the order of the parameters and launched in that order, never in
the order of readiness. Only the last backward pass of a stage is observed, so gradient accumulation
costs no communication. MPI makes progress only inside MPI calls, hence the polling between nodes.

Where several nodes hold neighbours of the axis, a bucket is summed in two levels
(comm/two_levels.py), in another order than in one.

Losses are divided by a global count before backward starts. The sum is all that is needed: nothing
here divides by the number of ranks.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillm import kernels
from minillm.autograd.backward import BackwardObserver
from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import Leaf
from minillm.base.arrays import Array
from minillm.comm.communicator import Work
from minillm.comm.mesh import Mesh
from minillm.comm.two_levels import Summing
from minillm.layout.flat import FlatLayout, P, Run, Span
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.layout.placement import Layout
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers, Memory, PrivateMemory
from minillm.replication.costs import Bytes, DataAxis, add_sum
from minillm.replication.method import Method, Setting
from minillm.replication.protocol import Replication


@dataclass
class Bucket:
    """Gradient bucket: a slice of the flat buffer that is reduced at once.

    `waiting` counts its parameters whose gradients are not complete.
    """

    spans: tuple[Span[Parameter], ...]
    slots: tuple[GradSlot, ...]
    comm: Summing
    tied: bool
    waiting: int = 0
    work: Work | None = None

    @property
    def slice(self) -> slice:
        """The elements of the flat buffer."""
        return slice(self.spans[0].start, self.spans[-1].stop)


class BucketReducer:
    """All-reduce of one stage's gradients in buckets, overlapped with its last backward pass.

    Implements `BackwardObserver`.
    """

    def __init__(
        self, buffers: FlatBuffers, mesh: Mesh, bucket_bytes: int, sums: Mapping[str, Summing]
    ) -> None:
        self.buffers, self.mesh, self.sums = buffers, mesh, sums
        self.buckets = [
            bucket for run in buffers.layout.runs for bucket in self._cut(run, bucket_bytes)
        ]
        self.overlaps = any(bucket.comm.size > 1 for bucket in self.buckets)
        self._bucket_of = {
            id(span.parameter): bucket for bucket in self.buckets for span in bucket.spans
        }
        self._next = 0  # the first bucket that has not been launched

    def _cut(self, run: Run[Parameter], bucket_bytes: int) -> list[Bucket]:
        comm = self.mesh.axis(*run.sum_axes)
        sums = self.sums.get(comm.name, comm)
        groups = bucket_spans(run, bucket_bytes, self.buffers.grads.itemsize)
        slots = [tuple(span.parameter.slot() for span in group) for group in groups]
        return [Bucket(tuple(g), s, sums, run.tied) for g, s in zip(groups, slots, strict=True)]

    def start_step(self) -> None:
        """Wait for every parameter again."""
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting, bucket.work = len(bucket.spans), None

    def leaf_ready(self, leaf: Leaf) -> None:
        """Launch the buckets that `leaf` completes.

        Buckets of tied weights wait for `reduce_ties`, which adds the gradients of other copies.
        """
        bucket = self._bucket_of[id(leaf)]
        if not bucket.tied:
            bucket.waiting -= 1
            while self._next < len(self.buckets) and self.buckets[self._next].waiting == 0:
                self._launch(self.buckets[self._next])

    def between_nodes(self) -> None:
        """Poll the reductions under way."""
        for bucket in self.buckets[: self._next]:
            if bucket.work is not None and bucket.work.test():
                bucket.work = None

    def finish(self) -> None:
        """Launch the remaining buckets and wait for all."""
        while self._next < len(self.buckets):
            self._launch(self.buckets[self._next])
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def _launch(self, bucket: Bucket) -> None:
        for slot in bucket.slots:
            slot.finish()
        if bucket.comm.size > 1:
            bucket.work = bucket.comm.iall_reduce_(self.buffers.grads[bucket.slice])
        self._next += 1


def bucket_spans(run: Run[P], bucket_bytes: int, itemsize: int) -> list[list[Span[P]]]:
    """Return the parameters of a run by buckets of at least `bucket_bytes`, the last one smaller.

    `itemsize` is the number of bytes of a gradient.
    """
    groups: list[list[Span[P]]] = [[]]
    for span in run.spans:
        size = sum(s.stop - s.start for s in groups[-1]) * itemsize
        if groups[-1] and size >= bucket_bytes:
            groups.append([])
        groups[-1].append(span)
    return groups


class AllReduce(Replication):
    """Replicas that each hold everything and all-reduce their gradients in buckets."""

    def __init__(self, mesh: Mesh, layout: Layout, memory: Memory, bucket_bytes: int) -> None:
        super().__init__(mesh, layout, memory)
        self.bucket_bytes = bucket_bytes
        self._sum_over(mesh.axis(*TOKEN_AXES), mesh.axis(*TOKEN_AXES, "tp"))

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Cut the gradients of each stage into buckets."""
        super().attach(buffers)
        self._reducers = {
            stage: BucketReducer(b, self.mesh, self.bucket_bytes, self.sums)
            for stage, b in buffers.items()
        }
        self._counted = counted_grads(buffers, self.layout, self.mesh.coords)

    def observer(self, stage: int, last: bool) -> BackwardObserver | None:
        """Return the stage's bucket reducer if there is another replica, in the last pass."""
        reducer = self._reducers[stage]
        return reducer if last and reducer.overlaps else None

    def begin_step(self) -> None:
        """Discard last step's gradients."""
        super().begin_step()
        for reducer in self._reducers.values():
            reducer.start_step()

    def reduce(self, stage: int) -> None:
        """Wait for the sums of all buckets of the stage."""
        started = time.perf_counter()
        self._reducers[stage].finish()
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> Any:
        """Return the squared norm of the parameters that this rank counts."""
        return sum(map(kernels.sum_of_squares, self._counted))


def counted_grads(
    buffers: Mapping[int, FlatBuffers], layout: Layout, coords: Mapping[str, int]
) -> list[Array]:
    """Return the slices of whole gradients that enter the norm on the rank at `coords`."""
    return [
        b.grads[part]
        for stage, b in buffers.items()
        for part, counts in counted_parts(b.layout, layout, stage, coords)
        if counts
    ]


def counted_parts(
    flat: FlatLayout,
    layout: Layout,
    stage: int,
    coords: Mapping[str, int],
    axes: Sequence[str] = (*TOKEN_AXES, "tp"),
) -> Iterator[tuple[slice, bool]]:
    """Yield maximal slices of a stage's flat buffer with whether this rank counts them in a norm.

    Of the ranks along `axes` that hold the same values, the first one counts; of a tied weight,
    the owner's copy. Gaps between parameters hold zeros, so joining neighbours is exact.
    """

    def counts(span: Span) -> bool:
        spec = span.parameter.spec
        first = all(axis in spec.axes or coords[axis] == 0 for axis in axes)
        return first and layout.owns(stage, spec.tie)

    for counted, spans in itertools.groupby(flat.spans(), counts):
        members = list(spans)
        yield slice(members[0].start, members[-1].stop), counted


def _make(setting: Setting) -> AllReduce:
    """Return the method in memory of each rank's own."""
    device = setting.device
    memory = PrivateMemory("" if device.on_host else device.describe(), device)
    return AllReduce(setting.mesh, setting.layout, memory, setting.bucket_bytes)


def _sends(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Each gradient once. Gaps between buckets are not sent."""
    found = Bytes()
    for run in layout.runs:
        for spans in bucket_spans(run, int(axis.options.bucket_mb * 1e6), axis.wide):
            size = spans[-1].stop - spans[0].start
            add_sum(found, axis, run.sum_axes, size)
    return found


METHOD = Method(
    name="all-reduce",
    option=None,
    make=_make,
    sends=_sends,
    uneven=lambda options: True,
    compared={"all-reduce": {"node_shared": "off"}},
)
