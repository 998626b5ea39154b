"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, kellerjordan.github.io).

For the gradient G of a linear map W [out, in] of a hidden layer:

    M = momentum * M + (1 - momentum) * G
    U = (1 - momentum) * G + momentum * M          (Nesterov)
    W = W - lr * weight_decay * W - lr * ratio * NewtonSchulz(U)

NewtonSchulz drives all singular values towards 1. `ratio` is that of torch.optim.Muon: "rms" is its
`match_rms_adamw`, 0.2 sqrt(max(out, in)) (Liu et al. 2025, arXiv:2502.16982), which takes AdamW's
rates and decay; "original" is sqrt(max(1, out / in)).

AdamW updates all other parameters: embeddings, head, norms and biases. A fused projection is
several maps: each segment, as q, k and v, is orthogonalised alone, on any mesh.

One rank owns a matrix where ranks share the update (ZeRO, shared memory): shares never cut one.
Otherwise every replica orthogonalises all of them, as it applies all of any update. The ranks along
tp gather the matrix that they cut, and each keeps its part of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm import kernels
from minillm.base.arrays import Array, namespace
from minillm.comm.mesh import Mesh
from minillm.layout.flat import Run, Span
from minillm.layout.sharding import Segment, Slices
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers, FlatState
from minillm.training.optim import AdamW, Part, round_into, scaled, shrinking, updated_parts, write

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic a x + b x^3 + c x^5, steepest at 0: five steps bring most of [0, 1] near 1."""
STEPS = 5
EPS = 1e-7  # least norm that a matrix is divided by


class Matrix(NamedTuple):
    """Hidden matrix that this rank updates, and its parameter."""

    parameter: Parameter
    part: Part


class Muon:
    """Muon for the hidden matrices of flat buffers, AdamW for the rest.

    `options` are those of `AdamW`. The gradient scale acts as there. `step` is collective over tp.
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffers],
        mesh: Mesh,
        *,
        momentum: float = 0.95,
        ratio: str = "rms",
        weight_decay: float = 0.1,
        cautious: bool = False,
        **options: Any,
    ) -> None:
        self.buffers, self.mesh = tuple(buffers), mesh
        self.momentum, self.ratio, self.cautious = momentum, RATIOS[ratio], cautious
        self.rest = AdamW(
            buffers, weight_decay=weight_decay, cautious=cautious, of=_is_cuttable, **options
        )
        self._momentum = [FlatState(b, of=_is_whole) for b in self.buffers]
        self._matrices = [
            Matrix(span.parameter, _part(b, state, span, weight_decay if run.decay else 0.0))
            for b, state in zip(self.buffers, self._momentum, strict=True)
            for run, span in _owned(b)
        ]

    def step(self, step: int, lr: float, grad_scale: Any) -> None:
        """Update this rank's share from the reduced gradient times `grad_scale`."""
        self.rest.step(step, lr, grad_scale)
        for parameter, (values, grads, (buf,), decay, rounded, rate) in self._matrices:
            grad = scaled(grads, grad_scale)
            write(buf, buf + (1 - self.momentum) * (grad - buf), grad_scale)
            update = grad + self.momentum * (buf - grad)
            update = self._orthogonalised(parameter, update)
            shrunk = shrinking(values, update) if self.cautious else values
            own = lr * rate
            write(values, values - own * decay * shrunk - own * update, grad_scale)
            round_into(rounded, values)

    def state(self) -> Mapping[str, Sequence[FlatState]]:
        """Return the state by name, one entry a stage."""
        return {"momentum": self._momentum, **self.rest.state()}

    def _orthogonalised(self, parameter: Parameter, update: Array) -> Array:
        """Return the local part [n] of the update of a matrix, from that of its momentum [n].

        Collective over tp where the matrix is cut.
        """
        spec, mesh, tp = parameter.spec, self.mesh, self.mesh.axis("tp")
        shape = spec.local_shape(mesh.shape)
        if not spec.axes or tp.size == 1:
            return self._whole(spec.dims, update.reshape(shape)).reshape(-1)
        shards = tp.all_gather(update).reshape(tp.size, *shape)
        whole = namespace(update).zeros(spec.shape, update.dtype)
        places = [
            list(spec.pieces(mesh.shape, {**mesh.coords, "tp": rank})) for rank in range(tp.size)
        ]
        for shard, pieces in zip(shards, places, strict=True):
            for globally, locally in pieces:
                whole[globally] = shard[locally]
        result = self._whole(spec.dims, whole)
        local = namespace(update).zeros(shape, update.dtype)
        for globally, locally in places[tp.rank]:
            local[locally] = result[globally]
        return local.reshape(-1)

    def _whole(self, dims: tuple[tuple[Segment, ...], ...], matrix: Array) -> Array:
        """Return the update of a whole matrix, block by block."""
        found = namespace(matrix).empty_like(matrix)
        for block in blocks(dims):
            part = matrix[block]
            found[block] = self.ratio(*part.shape) * newton_schulz(part)
        return found


RATIOS = {
    "rms": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
}
"""Length of an update of a matrix [rows, columns] relative to the rate."""


def newton_schulz(matrix: Array) -> Array:
    """Return `matrix` [m, n] with its singular values near 1, the singular vectors as they are."""
    xp, tall = namespace(matrix), matrix.shape[0] > matrix.shape[1]
    a, b, c = COEFFICIENTS
    x = matrix.T if tall else matrix
    x = x / xp.maximum(xp.sqrt((matrix * matrix).sum()), matrix.dtype.type(EPS))
    for _ in range(STEPS):
        gram = kernels.matmul(x, x.T)
        polynomial = c * kernels.matmul(gram, gram) + b * gram
        x = kernels.matmul(polynomial, x) + a * x
    return x.T if tall else x


def blocks(dims: tuple[tuple[Segment, ...], ...]) -> Iterator[Slices]:
    """Yield the blocks of a matrix that are linear maps of their own: one for each segment."""
    edges = [[0, *itertools.accumulate(segment.size for segment in dim)] for dim in dims]
    yield from itertools.product(*([slice(*e) for e in itertools.pairwise(d)] for d in edges))


def _is_whole(run: Run[Parameter]) -> bool:
    return run.whole


def _is_cuttable(run: Run[Parameter]) -> bool:
    return not run.whole


def _owned(buffers: FlatBuffers) -> Iterator[tuple[Run[Parameter], Span[Parameter]]]:
    """Yield the matrices in this rank's share, in the order of the buffer."""
    for run, part in buffers.shared_runs():
        for span in run.spans if run.whole else ():
            if part.start <= span.start and span.stop <= part.stop:
                yield run, span


def _part(buffers: FlatBuffers, state: FlatState, span: Span[Parameter], decay: float) -> Part:
    part = slice(span.start, span.stop)
    values, rounded = updated_parts(buffers, part)
    grads = buffers.at(buffers.grads, "grads", part)
    return Part(values, grads, (state.part(part),), decay, rounded, span.parameter.rate)
