"""Data parallelism: every rank of the dp axis computes the gradient of its own sequences; the sum
is everybody's gradient.

Gradients lie in flat buffers. They are cut into buckets of about `bucket_bytes`, in the order in
which the backward pass completes them, and a bucket's all-reduce starts as soon as its last
gradient is written, while backward goes on (Li et al. 2020, arXiv:2006.15704). Two rules keep all
ranks in step: buckets are fixed by the order of the parameters, and they are launched in that
order, never in the order of readiness. Only a stage's last backward of the step arms the reducer,
so gradient accumulation costs no communication. MPI makes progress only inside MPI calls, hence the
polling between nodes.

Losses are divided by a global count before backward starts, so a sum is all that is needed: nothing
here divides by the number of ranks.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from minillm import kernels
from minillm.autograd.backward import BackwardObserver
from minillm.autograd.tape import GradSlot, Leaf
from minillm.comm.communicator import Communicator, Work
from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers, Run, Span


class Reducer(Protocol):
    """Turns the gradients that each rank has computed into their sum, for one stage."""

    exposed_seconds: float
    """Time that backward did not hide, since the start."""

    @property
    def observer(self) -> BackwardObserver | None:
        """Who is told of the stage's last backward pass, to overlap the sums with it; None where
        there is nothing to overlap."""

    def start_step(self) -> None:
        """Forget the last step: every parameter is awaited again."""

    def tie_reduce(self) -> None:
        """Add up the gradients of the tied weights' copies on their stages, before the sum over the
        data."""

    def finish(self) -> None:
        """Return once the sums are there, those of parameters without any use being zero."""

    def sum_of_squares(self) -> float:
        """This rank's part of the squared norm of the whole model's gradient: added over all ranks,
        every parameter counts once."""


@dataclass
class Bucket:
    """A slice of the flat gradient buffer that is reduced at once, and the parameters in it that
    are still being computed."""

    spans: tuple[Span, ...]
    slots: tuple[GradSlot, ...]
    comm: Communicator
    tied: bool
    waiting: int = 0
    work: Work | None = None

    @property
    def slice(self) -> slice:
        """The bucket's elements in the flat buffer."""
        return slice(self.spans[0].start, self.spans[-1].stop)


class GradReducer:
    """The `Reducer` that all-reduces buckets while backward runs, which it observes if there is
    anybody to reduce with."""

    def __init__(self, buffers: FlatBuffers, mesh: Mesh, bucket_bytes: int) -> None:
        self.buffers = buffers
        self.mesh = mesh
        self.exposed_seconds = 0.0  # time that backward did not hide, since the start
        self.buckets = [bucket for run in buffers.runs for bucket in self._cut(run, bucket_bytes)]
        self._counted = [
            buffers.grads[part] for part, counts in by_counting(buffers, mesh) if counts
        ]
        self._first_replica = mesh.axis(*TOKEN_AXES).rank == 0
        self._overlaps = any(bucket.comm.size > 1 for bucket in self.buckets)
        self._bucket_of = {
            id(span.parameter): bucket for bucket in self.buckets for span in bucket.spans
        }
        self._next = 0

    @property
    def observer(self) -> BackwardObserver | None:
        """See `Reducer`."""
        return self if self._overlaps else None

    def _cut(self, run: Run, bucket_bytes: int) -> list[Bucket]:
        axes = TOKEN_AXES + tuple(axis for axis in run.partial_over if axis not in TOKEN_AXES)
        comm = self.mesh.axis(*axes)
        groups: list[list[Span]] = [[]]
        for span in run.spans:
            size = sum(s.stop - s.start for s in groups[-1]) * self.buffers.grads.itemsize
            if groups[-1] and size >= bucket_bytes:
                groups.append([])
            groups[-1].append(span)
        return [
            Bucket(tuple(group), tuple(span.parameter.slot() for span in group), comm, run.tied)
            for group in groups
        ]

    def start_step(self) -> None:
        """See `Reducer`."""
        self.buffers.start_step()
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting, bucket.work = len(bucket.spans), None

    def leaf_ready(self, leaf: Leaf) -> None:
        """See `BackwardObserver`. A tied weight's gradient is not complete: its other copies are
        added by `tie_reduce` first."""
        bucket = self._bucket_of[id(leaf)]
        if not bucket.tied:
            bucket.waiting -= 1
            self._launch_ready()

    def between_nodes(self) -> None:
        """See `BackwardObserver`."""
        for bucket in self.buckets[: self._next]:
            if bucket.work is not None and bucket.work.test():
                bucket.work = None

    def tie_reduce(self) -> None:
        """See `Reducer`."""
        sum_tied_copies(self.buffers, self.mesh)
        for bucket in self.buckets:
            if bucket.tied:
                bucket.waiting = 0

    def finish(self) -> None:
        """See `Reducer`."""
        started = time.perf_counter()
        while self._next < len(self.buckets):
            self._launch(self.buckets[self._next])
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> float:
        """See `Reducer`. Replicas hold the same sums: the first one counts."""
        return sum(map(kernels.sum_of_squares, self._counted)) if self._first_replica else 0.0

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and self.buckets[self._next].waiting == 0:
            self._launch(self.buckets[self._next])

    def _launch(self, bucket: Bucket) -> None:
        for slot in bucket.slots:
            slot.finish()
        if bucket.comm.size > 1:
            bucket.work = bucket.comm.iall_reduce_(self.buffers.grads[bucket.slice])
        self._next += 1


def sum_tied_copies(buffers: FlatBuffers, mesh: Mesh) -> None:
    """Add up the gradients of tied weights over the stages that hold a copy."""
    for span in buffers.spans():
        parameter = span.parameter
        if parameter.spec.tie is not None:
            comm = mesh.tie(parameter.spec.tie)
            assert comm is not None, f"rank holds {parameter.name} but is not in its tie group"
            slot = parameter.slot()
            slot.finish()
            comm.all_reduce_(slot.buf)
            slot.writes += 1


def counted(parameter: Parameter, mesh: Mesh) -> bool:
    """Whether this rank counts its part of `parameter` in sums over the tp and pp ranks: a
    replicated parameter counts on one rank, a tied one in its first copy."""
    return ("tp" in parameter.spec.axes or mesh.coord("tp") == 0) and (
        parameter.spec.tie is None or mesh.coord("pp") == 0
    )


def by_counting(buffers: FlatBuffers, mesh: Mesh) -> Iterator[tuple[slice, bool]]:
    """The flat buffers cut where `counted` changes: long parts, since neighbours are joined and the
    gaps between them hold zeros."""
    for counts, spans in itertools.groupby(
        buffers.spans(), lambda span: counted(span.parameter, mesh)
    ):
        members = list(spans)
        yield slice(members[0].start, members[-1].stop), counts
