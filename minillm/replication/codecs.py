"""Codecs of compressed gradients: one class sums the workers' matrices in fewer bytes.

A codec sees whole matrices, the local 2-d views of parameters. Each worker adds what it could not
send to its next gradient (error feedback: Seide et al. 2014; Karimireddy et al. 2019,
arXiv:1901.09847). Hence, in exact arithmetic and after every step: the applied sums, plus the error
memory of all workers and servers, are the sums of all gradients.

Sums are never means: losses are divided by a global count before backward starts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from minillm import kernels
from minillm.base import rng
from minillm.base.arrays import Array, namespace
from minillm.comm.buffers import even_counts
from minillm.comm.communicator import Communicator

SMALLEST = 256  # elements; smaller arrays are summed densely, because their scales cost as much
NARROW = np.dtype(ml_dtypes.bfloat16)
WIDE = np.dtype(np.float32)


@dataclass
class Matrix:
    """Gradient of one parameter as a matrix, with what a codec keeps of it between steps."""

    name: str
    grad: Array  # [rows, columns], a view of the flat buffer
    real: int = -1  # elements before the padding of a vocabulary cut over tp; -1: all
    error: Array | None = None  # as `grad`: what this worker has not sent yet
    shared: dict[str, Array] = field(default_factory=dict)  # equal on all workers
    private: dict[str, Array] = field(default_factory=dict)  # of this worker alone

    def __post_init__(self) -> None:
        """Count every element where none is padding."""
        self.real = self.grad.size if self.real < 0 else self.real

    def fed_back(self) -> Array:
        """Add the gradient to the error memory and return the memory, flat."""
        assert self.error is not None
        self.error += self.grad
        return self.error.reshape(-1)


class Codec:
    """Sum of matrices over workers in a compressed form. Base class of the codecs."""

    description: str  # for the plan
    remembers = True  # has error memory
    on_host = True  # works on NumPy arrays alone

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether an array of this shape is compressed, not summed densely."""
        return len(shape) > 1 and math.prod(shape) >= SMALLEST

    def start(self, matrix: Matrix, comm: Communicator) -> None:
        """Allocate what the codec keeps of `matrix`."""
        if self.remembers:
            matrix.error = np.zeros_like(matrix.grad)

    def sum_(self, matrices: Sequence[Matrix], comm: Communicator) -> None:
        """Overwrite each gradient with the decoded sum over `comm`, the same bits on all ranks.

        Updates the error memory. Collective.
        """
        raise TypeError(f"{type(self).__name__} does not define sum_")

    def payload(self, shapes: Sequence[tuple[int, ...]], workers: int, wide: int) -> dict[str, int]:
        """Return the bytes by operation in which matrices of these shapes are summed.

        `wide` are the bytes of a gradient.
        """
        raise TypeError(f"{type(self).__name__} does not define payload")

    def shares(self, workers: int) -> tuple[float, float]:
        """Return error memory and messages in memory, as shares of the gradients."""
        return float(self.remembers), 0.0


class Bf16(Codec):
    """Wire of 16-bit floats: the sum is taken in float32, in rank order, with two roundings."""

    description = "gradients sent as bfloat16 (not mesh-invariant in dp)"
    remembers = False
    on_host = False

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return True: every element costs half."""
        return True

    def sum_(self, matrices: Sequence[Matrix], comm: Communicator) -> None:
        """Reduce-scatter by an all-to-all of rounded blocks, add in float32, gather rounded."""
        wire = namespace(matrices[0].grad).empty(sum(m.grad.size for m in matrices), NARROW)
        for matrix, part in _parts(wire, [m.grad.size for m in matrices]):
            kernels.cast(matrices[matrix].grad.reshape(-1), NARROW, out=part)
        counts = even_counts(wire.size, comm.size)
        blocks = [part for _, part in _parts(wire, counts)]
        received = comm.all_to_all(blocks, [counts[comm.rank]] * comm.size)
        total = kernels.cast(received[0], WIDE)
        for block in received[1:]:
            total += kernels.cast(block, WIDE)
        whole = comm.all_gather(kernels.cast(total, NARROW), sizes=counts)
        for matrix, part in _parts(whole, [m.grad.size for m in matrices]):
            grad = matrices[matrix].grad
            grad[...] = kernels.cast(part, grad.dtype).reshape(grad.shape)

    def payload(self, shapes: Sequence[tuple[int, ...]], workers: int, wide: int) -> dict[str, int]:
        """Return two bytes an element each way."""
        num_bytes = 2 * sum(map(math.prod, shapes))
        return {"all_to_all": num_bytes, "all_gather": num_bytes}

    def shares(self, workers: int) -> tuple[float, float]:
        """Return what is sent, received and gathered, and a float32 sum."""
        return 0.0, 1.5 + 1 / workers


class PowerSGD(Codec):
    """Rank-r approximation by one step of power iteration (Vogels et al. 2019, arXiv:1905.13727).

    The start of the iteration is the last step's result. Both products are linear in the matrices,
    so the sum does not depend on the number of workers. Error memory is the local variant: what
    this worker's own projection misses. The aggregated one also collects the worker's deviation
    from the others, which grows with every step.
    """

    def __init__(self, rank: int, seed: int) -> None:
        self.rank, self.seed = rank, seed
        self.description = f"gradients compressed by PowerSGD of rank {rank}"

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether two factors are smaller than the matrix."""
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        return super().takes(shape) and self.rank * (rows + columns) < rows * columns

    def start(self, matrix: Matrix, comm: Communicator) -> None:
        """Draw the first basis from the seed and the parameter's name: equal on all workers."""
        super().start(matrix, comm)
        shape = (matrix.grad.shape[1], self.rank)
        drawn = rng.normal(
            rng.key(self.seed, "powersgd", matrix.name),
            shape,
            tuple(slice(0, n) for n in shape),
            np.dtype(matrix.grad.dtype),
        )
        matrix.shared["basis"] = drawn

    def sum_(self, matrices: Sequence[Matrix], comm: Communicator) -> None:
        """All-reduce the left factors, orthonormalise, and all-reduce the right factors."""
        dtype = matrices[0].grad.dtype
        rows, columns = ([m.grad.shape[i] * self.rank for m in matrices] for i in (0, 1))
        lefts, rights = np.empty(sum(rows), dtype), np.empty(sum(columns), dtype)
        for number, left in _parts(lefts, rows):
            matrix = matrices[number]
            matrix.fed_back()
            left.reshape(-1, self.rank)[...] = matrix.error @ matrix.shared["basis"]
        comm.all_reduce_(lefts)
        for (number, left), (_, right) in zip(
            _parts(lefts, rows), _parts(rights, columns), strict=True
        ):
            matrix, basis = matrices[number], orthonormal(left.reshape(-1, self.rank))
            left.reshape(-1, self.rank)[...] = basis
            factor = right.reshape(-1, self.rank)
            factor[...] = matrix.error.T @ basis  # type: ignore[union-attr]
            matrix.error -= basis @ factor.T
        comm.all_reduce_(rights)
        for (number, left), (_, right) in zip(
            _parts(lefts, rows), _parts(rights, columns), strict=True
        ):
            matrix, factor = matrices[number], right.reshape(-1, self.rank)
            matrix.grad[...] = left.reshape(-1, self.rank) @ factor.T
            matrix.shared["basis"][...] = factor

    def payload(self, shapes: Sequence[tuple[int, ...]], workers: int, wide: int) -> dict[str, int]:
        """Return the bytes of both factors."""
        edges = sum(math.prod(shape[:-1]) + shape[-1] for shape in shapes)
        return {"all_reduce": self.rank * edges * wide}


class TopK(Codec):
    """The `share` of largest elements of each worker (Stich et al. 2018, arXiv:1809.07599).

    A worker gathers the values and places of all others. The union grows with the workers, so
    this sends more than an all-reduce if `share` is above about 1 / workers.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.description = (
            f"the largest {100 * share:g} % of gradients sent (not mesh-invariant in dp)"
        )

    def sum_(self, matrices: Sequence[Matrix], comm: Communicator) -> None:
        """Gather the largest elements and add them in rank order."""
        counts = [self.count(m.grad.size) for m in matrices]
        values, places = [], []
        for matrix, count in zip(matrices, counts, strict=True):
            memory = matrix.fed_back()
            chosen = largest(memory, count)
            values.append(memory[chosen])
            places.append(chosen)
            memory[chosen] = 0
        all_values = comm.all_gather(np.concatenate(values)).reshape(comm.size, -1)
        all_places = comm.all_gather(np.concatenate(places)).reshape(comm.size, -1)
        start = 0
        for matrix, count in zip(matrices, counts, strict=True):
            part = slice(start, start + count)
            matrix.grad[...] = 0
            add_at(matrix.grad.reshape(-1), all_places[:, part], all_values[:, part])
            start += count

    def count(self, size: int) -> int:
        """Return the number of elements that a worker sends of a matrix of `size`."""
        return max(1, math.ceil(self.share * size))

    def payload(self, shapes: Sequence[tuple[int, ...]], workers: int, wide: int) -> dict[str, int]:
        """Return the bytes of the values and 4-byte places of all workers."""
        count = sum(self.count(math.prod(shape)) for shape in shapes)
        return {"all_gather": workers * count * (wide + 4)}

    def shares(self, workers: int) -> tuple[float, float]:
        """Return one memory, and values and places, own and gathered."""
        return 1.0, 2 * self.share * (1 + workers)


class OneBit(Codec):
    """One sign bit an element and one scale a matrix, in two stages (Seide et al. 2014).

    Worker r is the server of block r of each matrix: it receives the block's signs from all,
    decodes, adds its own error memory, and sends signs and a scale of the sum (Tang et al. 2021,
    arXiv:2102.02888). A zero counts as positive. Padding, to whole bytes or of a vocabulary, enters
    no scale, and its sum is zero: a sign would move rows that no token has, and enter the norm.
    """

    description = "gradients sent as signs and scales (not mesh-invariant in dp)"

    def start(self, matrix: Matrix, comm: Communicator) -> None:
        """Allocate the memory of a worker and of the server of a block."""
        super().start(matrix, comm)
        block = padded(matrix.grad.size, comm.size) // comm.size
        matrix.private["server"] = np.zeros(block, matrix.grad.dtype)

    def sum_(self, matrices: Sequence[Matrix], comm: Communicator) -> None:
        """Exchange the signs of all blocks, add and compress again, and gather."""
        dtype = matrices[0].grad.dtype
        blocks = [m.private["server"].size for m in matrices]
        scales, signs = [], []
        for matrix, block in zip(matrices, blocks, strict=True):
            scale, bits = self._compress(matrix.fed_back(), matrix.real, block * comm.size)
            scales.append(scale)
            signs.append(bits.reshape(comm.size, -1))
        head = np.stack(scales).view(np.uint8)
        messages = [np.concatenate([head, *(s[r] for s in signs)]) for r in range(comm.size)]
        received = comm.all_to_all(messages)
        for message in received:
            for matrix, scale, bits in self._decode(message, matrices, blocks):
                matrix.private["server"] += scale * unpacked_signs(bits, dtype)
        scales, signs = [], []
        for matrix, block in zip(matrices, blocks, strict=True):
            real = min(max(matrix.real - comm.rank * block, 0), block)
            scale, bits = self._compress(matrix.private["server"], real, block)
            scales.append(scale)
            signs.append(bits)
        answer = np.concatenate([np.stack(scales).view(np.uint8), *signs])
        answers = comm.all_gather(answer).reshape(comm.size, -1)
        for server, message in enumerate(answers):
            for (matrix, scale, bits), block in zip(
                self._decode(message, matrices, blocks), blocks, strict=True
            ):
                part = matrix.grad.reshape(-1)[server * block : (server + 1) * block]
                part[...] = scale * unpacked_signs(bits, dtype)[: part.size]
        for matrix in matrices:
            matrix.grad.reshape(-1)[matrix.real :] = 0

    def payload(self, shapes: Sequence[tuple[int, ...]], workers: int, wide: int) -> dict[str, int]:
        """Return the bytes of signs, padded to whole bytes of each server, and of scales."""
        signs = sum(padded(math.prod(shape), workers) // 8 for shape in shapes)
        both = signs + workers * wide * len(shapes)
        return {"all_to_all": both, "all_gather": both}

    def shares(self, workers: int) -> tuple[float, float]:
        """Return the memories of a worker and a server, and four sets of signs.

        They are own, received and gathered ones, and those of a block's sum.
        """
        return 1 + 1 / workers, 4 / 32

    @staticmethod
    def _compress(memory: Array, real: int, length: int) -> tuple[Array, Array]:
        """Return scale and packed signs of flat `memory`, and leave in it what they miss.

        Elements from `real` on are padding: they are set to zero, and have no part in the scale.
        """
        scale = np.abs(memory[:real]).mean() if real else np.zeros((), memory.dtype)
        bits = packed_signs(memory, length)
        memory -= np.where(memory >= 0, scale, -scale)
        memory[real:] = 0
        return scale, bits

    @staticmethod
    def _decode(
        message: Array, matrices: Sequence[Matrix], blocks: Sequence[int]
    ) -> Iterator[tuple[Matrix, Array, Array]]:
        """Yield each matrix with its scale and packed signs in a message."""
        dtype = matrices[0].grad.dtype
        head = len(matrices) * dtype.itemsize
        scales = message[:head].copy().view(dtype)  # a copy is aligned
        for number, bits in _parts(message[head:], [block // 8 for block in blocks]):
            yield matrices[number], scales[number], bits


def largest(flat: Array, count: int) -> Array:
    """Return the places, int32, of the `count` elements of largest magnitude, ascending.

    Of equal magnitudes the first ones are taken. NaN counts as infinite, so it is sent.
    """
    size = np.abs(flat)
    size = np.where(np.isnan(size), np.inf, size)
    least = np.partition(size, flat.size - count)[flat.size - count]
    above = np.flatnonzero(size > least)
    equal = np.flatnonzero(size == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal])).astype(np.int32)


def add_at(flat: Array, places: Array, values: Array) -> None:
    """Add `values` to `flat` at `places`, both [workers, count], in the order of the workers.

    No place comes twice in a row, so indexing drops nothing.
    """
    for place, value in zip(places, values, strict=True):
        flat[place] += value


def orthonormal(matrix: Array) -> Array:
    """Return orthonormal columns whose span holds that of `matrix` [rows, rank], rank <= rows.

    Householder reflections complete the basis where columns are zero or dependent: no division by
    a norm, and no NaN.
    """
    return np.linalg.qr(matrix)[0]


def padded(size: int, workers: int) -> int:
    """Return `size` rounded up to whole bytes of bits for each worker."""
    return -(-size // (8 * workers)) * 8 * workers


def packed_signs(flat: Array, length: int) -> Array:
    """Return one bit an element, 1 from zero on, as bytes [length / 8]; `length` is padded."""
    bits = np.zeros(length, bool)
    bits[: flat.size] = flat >= 0
    return np.packbits(bits)


def unpacked_signs(bits: Array, dtype: np.dtype) -> Array:
    """Return 1 or -1 for each bit, in `dtype`."""
    return np.unpackbits(bits).astype(dtype) * 2 - 1


def _parts(flat: Array, counts: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """Yield consecutive views of `flat` with these numbers of elements, numbered."""
    stops = itertools.accumulate(counts)
    for number, (stop, count) in enumerate(zip(stops, counts, strict=True)):
        yield number, flat[stop - count : stop]
