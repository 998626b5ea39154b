"""Compressed gradients: replicas that hold everything and sum their gradients through a codec.

After the last backward pass, each run of the flat buffer is summed: first over the axes on which a
gradient is partial besides the data axes, densely; then over the data axes, matrices by the codec
(codecs.py) and small arrays by an all-reduce. Tied weights come after `reduce_ties`, with the same
gradient, memory and result on every copy.

Invariant: a matrix is compressed alone, never with its neighbours in the buffer, and runs are
summed in the order of the buffer. All ranks of a data axis then hold the same bits. Of arrays on
a GPU, every codec but bf16 works on copies in host memory.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.arrays import Array, namespace, on_host, to_device, to_host
from minillm.comm.mesh import Mesh
from minillm.layout.flat import FlatLayout, Run
from minillm.layout.mesh_shape import TOKEN_AXES, MeshShape
from minillm.layout.placement import Layout
from minillm.layout.sharding import Segment, ShardSpec
from minillm.params.parameter import Parameter
from minillm.params.state import StateTensor
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.replication.all_reduce import counted_grads
from minillm.replication.codecs import Bf16, Codec, Matrix, OneBit, PowerSGD, TopK
from minillm.replication.costs import Bytes, DataAxis, Held, Sizes, add
from minillm.replication.method import Method, Setting, saved, whole
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Optimizer, Replication

FALLBACKS = {
    "error": "the error memory of compressed gradients begins at zero: the checkpoint has none of "
    "this method and number of data-parallel ranks",
    "server": "the error memory of summed signs begins at zero: the checkpoint has none of this "
    "method and layout",
    "basis": "PowerSGD begins from random bases: the checkpoint has none of this rank and layout",
}


class CompressedRun:
    """Sum of one run of the flat buffer over the replicas."""

    def __init__(self, buffers: FlatBuffers, run: Run[Parameter], mesh: Mesh, codec: Codec) -> None:
        self.codec = codec
        self.axes = tuple(axis for axis in run.sum_axes if axis in TOKEN_AXES)
        self.comm = mesh.axis(*self.axes)
        self._partial = [mesh.axis(axis) for axis in run.sum_axes if axis not in TOKEN_AXES]
        self._whole = buffers.grads[run.start : run.stop]
        self.matrices: list[tuple[Parameter, Matrix]] = []
        self._dense: list[Array] = []
        self._staged: list[tuple[np.ndarray, Array]] = []  # copies on the host of device arrays
        for taken, members in itertools.groupby(
            run.spans, lambda span: codec.takes(buffers.shape_of(span.parameter))
        ):
            spans = list(members)
            if not taken:
                self._dense.append(buffers.grads[spans[0].start : spans[-1].stop])
                continue
            for span in spans:
                shape = buffers.shape_of(span.parameter)
                view = buffers.grads[span.start : span.stop].reshape(-1, shape[-1])
                staged = codec.on_host and not on_host(view)
                grad = np.empty(view.shape, view.dtype) if staged else view
                pieces = list(span.parameter.spec.pieces(mesh.shape, mesh.coords))
                real = max((local[0].stop for _, local in pieces), default=0)
                matrix = Matrix(span.parameter.name, grad, real * grad.size // shape[0])
                codec.start(matrix, self.comm)
                self.matrices.append((span.parameter, matrix))
                if staged:
                    self._staged.append((grad, view))

    def sum(self) -> None:
        """Replace the gradients of the run by their sum. Collective."""
        for comm in self._partial:
            comm.all_reduce_(self._whole)
        works = [self.comm.iall_reduce_(part) for part in self._dense]
        for copy, view in self._staged:
            copy[...] = to_host(view)
        if self.matrices:
            self.codec.sum_([matrix for _, matrix in self.matrices], self.comm)
        for copy, view in self._staged:
            view[...] = to_device(copy, namespace(view))
        for work in works:
            work.wait()


class Compressed(Replication):
    """Replicas that each hold everything and sum their gradients through a codec.

    One replica also compresses, so that the number of replicas alone changes nothing about a method
    that is linear in the sum.
    """

    def __init__(self, mesh: Mesh, layout: Layout, memory: PrivateMemory, codec: Codec) -> None:
        super().__init__(mesh, layout, memory)
        self.codec = codec
        self._moved = False  # the memory has seen a gradient that is not applied yet

    def attach(self, buffers: Mapping[int, FlatBuffers]) -> None:
        """Allocate the error memory of each stage."""
        super().attach(buffers)
        self._runs = {
            stage: [CompressedRun(b, run, self.mesh, self.codec) for run in b.layout.runs]
            for stage, b in buffers.items()
        }
        self._counted = counted_grads(buffers, self.layout, self.mesh.coords)

    def reduce(self, stage: int) -> None:
        """Sum the gradients of the stage, run by run."""
        super().reduce(stage)
        started, self._moved = time.perf_counter(), True
        for run in self._runs[stage]:
            run.sum()
        self.exposed_seconds += time.perf_counter() - started

    def sum_of_squares(self) -> Any:
        """Return the squared norm of the parameters that this rank counts."""
        return sum(map(kernels.sum_of_squares, self._counted))

    def update(self, optimizer: Optimizer, step: int, lr: float, scale: Any) -> None:
        """Update the parameters, on every rank alike."""
        super().update(optimizer, step, lr, scale)
        self._moved = False

    def state(self) -> Iterator[StateTensor]:
        """Yield error memory and bases; nothing between a reduction and its update.

        A checkpoint of that moment belongs to a step that failed. Its memory would count a
        gradient twice.
        Error memory is named by worker and cut like its parameter, so it resumes on any tp and pp
        with the same number of workers.
        """
        if self._moved:
            return
        for stage, runs in self._runs.items():
            for run in runs:
                for parameter, matrix in run.matrices:
                    for kind, spec, data in self._kept(run, parameter, matrix):
                        name = f"compress/{kind}/{parameter.name}"
                        owned = self.layout.owns(stage, parameter.spec.tie)
                        yield StateTensor(name, spec, data, owned=owned, fallback=FALLBACKS[kind])

    def _kept(
        self, run: CompressedRun, parameter: Parameter, matrix: Matrix
    ) -> Iterator[tuple[str, ShardSpec, Array]]:
        """Yield kind, sharding and local array of what the codec keeps of a matrix."""
        spec, shape = parameter.spec, self.mesh.shape
        worker = (Segment(shape.size(*run.axes), run.axes),)
        if matrix.error is not None:
            cut = ShardSpec((worker[0].size, *spec.shape), (worker, *spec.dims), pad=spec.pad)
            yield "error", cut, matrix.error.reshape(1, *spec.local_shape(shape))
        # Arrays that belong to a shard have no global index: one row for each shard.
        axes = tuple(sorted(spec.axes))
        shard = (Segment(math.prod(shape.size(axis) for axis in axes), axes),)
        for kept, first in (matrix.shared, (Segment(1),)), (matrix.private, worker):
            for kind, array in kept.items():
                dims = (first, shard, *((Segment(size),) for size in array.shape))
                sizes = (first[0].size, shard[0].size, *array.shape)
                yield kind, ShardSpec(sizes, dims), array[None, None]


def _make(setting: Setting) -> Compressed:
    codec = codec_of(setting.options, setting.seed)
    memory = PrivateMemory(codec.description, setting.device)
    return Compressed(setting.mesh, setting.layout, memory, codec)


def codec_of(options: ReplicationOptions, seed: int = 0) -> Codec:
    """Return the codec that `options` name. `seed` draws the first bases of PowerSGD."""
    return CODECS[options.compress](options, seed)


CODECS: dict[str, Callable[[ReplicationOptions, int], Codec]] = {
    "bf16": lambda options, seed: Bf16(),
    "powersgd": lambda options, seed: PowerSGD(options.compress_rank, seed),
    "topk": lambda options, seed: TopK(options.compress_share),
    "onebit": lambda options, seed: OneBit(),
}


def _sends(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Matrices by the codec's message, the other arrays densely, run by run."""
    found, codec = Bytes(), codec_of(axis.options)
    for run in layout.runs:
        shapes = []
        for taken, members in itertools.groupby(
            run.spans, lambda span: codec.takes(span.parameter.spec.local_shape(axis.mesh))
        ):
            spans = list(members)
            if taken:
                shapes += [span.parameter.spec.local_shape(axis.mesh) for span in spans]
            else:
                size = (spans[-1].stop - spans[0].start) * axis.wide
                add(found, axis.mesh, ("dp",), "all_reduce", size)
        if shapes:
            for operation, count in codec.payload(shapes, axis.mesh.dp, axis.wide).items():
                add(found, axis.mesh, ("dp",), operation, count)
    return found


def _holds(sizes: Sizes, options: ReplicationOptions) -> Held:
    """Return the bytes of a whole replica, error memory and messages.

    Those of a codec that works on the host are not in a GPU's memory.
    """
    held, codec = whole(sizes, options), codec_of(options)
    if codec.on_host and not sizes.on_host:
        return held
    memory, messages = codec.shares(sizes.workers)
    errors = round(memory * sizes.values) * sizes.wide
    messages = round(messages * sizes.values * sizes.wide)
    return held._replace(grads=held.grads + errors, messages=messages)


def _saves(sizes: Sizes, options: ReplicationOptions) -> int:
    """Return the bytes of the part of the common state, and of the error memory."""
    memory, _ = codec_of(options).shares(sizes.workers)
    return saved(sizes, options) + round(memory * sizes.values) * sizes.wide


def _key(options: ReplicationOptions) -> dict[str, Any]:
    size = next((name for name, codec in SIZES.items() if codec == options.compress), None)
    return {
        "compress": options.compress,
        "compress_size": 0 if size is None else getattr(options, size),
    }


def _equals_one_rank(options: ReplicationOptions, mesh: MeshShape) -> bool:
    """Return whether the codec is linear and sees whole matrices.

    PowerSGD compresses the shards of tp. The other codecs round what each worker sends.
    """
    return options.compress == "powersgd" and mesh.tp == 1


SIZES = {"compress_rank": "powersgd", "compress_share": "topk"}
METHOD = Method(
    name="compressed",
    option="compress",
    lost=lambda options: (
        "a lost worker takes along what it has left unsent"
        if options.compress != "bf16"
        else "this method needs as many microbatches on every replica"
    ),
    unskippable=lambda options: (
        "what is left unsent already holds a part of the gradient"
        if codec_of(options).remembers
        else ""
    ),
    make=_make,
    sends=_sends,
    holds=_holds,
    saves=_saves,
    key=_key,
    equals_one_rank=_equals_one_rank,
    needs={name: f"--compress {codec}" for name, codec in SIZES.items()},
    compared={codec: {"compress": codec} for codec in CODECS},
)
