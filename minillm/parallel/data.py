"""Data parallelism: every rank of the dp axis computes the gradient of its own sequences; the sum is everybody's gradient.

Gradients lie in flat buffers. They are cut into buckets of about `bucket_bytes`, in the order in which the backward pass completes them,
and a bucket's all-reduce starts as soon as its last gradient is written, while backward goes on (Li et al. 2020, arXiv:2006.15704). Two
rules keep all ranks in step: buckets are fixed by the order of the parameters, and they are launched in that order, never in the order of
readiness. Only a stage's last backward of the step arms the reducer, so gradient accumulation costs no communication. MPI makes progress
only inside MPI calls, hence the polling between nodes.

Losses are divided by a global count before backward starts, so a sum is all that is needed: nothing here divides by the number of ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from minillm.autograd import Leaf
from minillm.comm.communicator import Communicator, Work
from minillm.comm.mesh import Mesh
from minillm.nn.module import Parameter
from minillm.nn.storage import FlatBuffers, Run, Span

TOKEN_AXES = ("dp", "ep", "cp")  # the axes over which a batch's tokens are spread


@dataclass
class Bucket:
    """A slice of the flat gradient buffer that is reduced at once, and the parameters in it that are still being computed."""

    spans: tuple[Span, ...]
    comm: Communicator
    tied: bool
    waiting: int = 0
    work: Work | None = None

    @property
    def slice(self) -> slice:
        """The bucket's elements in the flat buffer."""
        return slice(self.spans[0].start, self.spans[-1].stop)


class GradReducer:
    """Reduces one stage's gradients during its last backward pass; a BackwardObserver."""

    def __init__(self, buffers: FlatBuffers, mesh: Mesh, bucket_bytes: int) -> None:
        self.buffers = buffers
        self.mesh = mesh
        self.exposed_seconds = 0.0  # time that backward did not hide, since the start
        self.buckets = [bucket for run in buffers.runs for bucket in self._cut(run, bucket_bytes)]
        self._bucket_of = {id(span.parameter): bucket for bucket in self.buckets for span in bucket.spans}
        self._next = 0

    def _cut(self, run: Run, bucket_bytes: int) -> list[Bucket]:
        axes = TOKEN_AXES + tuple(axis for axis in run.partial_over if axis not in TOKEN_AXES)
        comm = self.mesh.axis(*axes)
        groups: list[list[Span]] = [[]]
        for span in run.spans:
            size = sum(s.stop - s.start for s in groups[-1]) * self.buffers.grads.itemsize
            if groups[-1] and size >= bucket_bytes:
                groups.append([])
            groups[-1].append(span)
        return [Bucket(tuple(group), comm, run.tied) for group in groups]

    def start_step(self) -> None:
        """Forget the last step: every parameter of every bucket is awaited again."""
        self.buffers.start_step()
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting, bucket.work = len(bucket.spans), None

    def leaf_ready(self, leaf: Leaf) -> None:
        """The gradient of `leaf` is complete on this rank. A tied weight's is not: its other copies are added by `tie_reduce` first."""
        bucket = self._bucket_of[id(leaf)]
        if not bucket.tied:
            bucket.waiting -= 1
            self._launch_ready()

    def between_nodes(self) -> None:
        """Let the pending reductions make progress."""
        for bucket in self.buckets[: self._next]:
            if bucket.work is not None and bucket.work.test():
                bucket.work = None

    def tie_reduce(self) -> None:
        """Add up the gradients of the tied weights' copies on their stages, before the sum over the data."""
        for bucket in self.buckets:
            if bucket.tied:
                for span in bucket.spans:
                    self._sum_copies(span)
                bucket.waiting = 0

    def finish(self) -> None:
        """Launch what is left (parameters without any use count as zero) and wait for all sums."""
        started = time.perf_counter()
        while self._next < len(self.buckets):
            self._launch(self.buckets[self._next])
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        self.exposed_seconds += time.perf_counter() - started

    def _sum_copies(self, span: Span) -> None:
        parameter: Parameter = span.parameter
        assert parameter.spec.tie is not None
        comm = self.mesh.tie(parameter.spec.tie)
        assert comm is not None, f"rank holds {parameter.name} but is not in its tie group"
        slot = parameter.slot()
        slot.finish()
        comm.all_reduce_(slot.buf)
        slot.writes += 1

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and self.buckets[self._next].waiting == 0:
            self._launch(self.buckets[self._next])

    def _launch(self, bucket: Bucket) -> None:
        for span in bucket.spans:
            span.parameter.slot().finish()
        if bucket.comm.size > 1:
            bucket.work = bucket.comm.iall_reduce_(self.buffers.grads[bucket.slice])
        self._next += 1
