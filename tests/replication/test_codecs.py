"""Codecs: the laws of error feedback, serial simulations, round trips, planted bugs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi_helpers import mpirun, needs_mpirun
from replication.virtual_workers import VirtualBf16, VirtualOneBit, VirtualSum, VirtualTopK

from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.replication import codecs
from minillm.replication.codecs import Bf16, Codec, Matrix, OneBit, PowerSGD, TopK
from minillm.replication.compressed import codec_of
from minillm.replication.options import ReplicationOptions

SEEDS = st.integers(0, 99)
SHAPES = [(17, 19), (24, 16)]  # the first one is padded on every number of workers
MAKE: dict[str, Callable[[], Codec]] = {
    "powersgd": lambda: PowerSGD(2, seed=5),
    "topk": lambda: TopK(0.1),
    "onebit": OneBit,
}


def gradients(workers: int, steps: int, shapes: Any = SHAPES, seed: int = 0) -> list[Any]:
    """Return random gradients [step][matrix] of shape [workers, rows, columns], some of them 0."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        values = rng.normal(size=(workers, *shape)) * np.arange(1, workers + 1)[:, None, None]
        return np.where(rng.random(values.shape) < 0.2, 0.0, values)

    return [[draw(shape) for shape in shapes] for _ in range(steps)]


def exchange_here(
    comm: Communicator, make: Callable[[], Codec], grads: list[Any], real: Sequence[int] = ()
) -> list[Any]:
    """Run a codec on this rank. Returns [step][matrix] of (sum, error, server)."""
    codec, found = make(), []
    real = real or [g[0].size for g in grads[0]]
    matrices = [
        Matrix(f"m{i}", np.zeros(g.shape[1:]), size)
        for i, (g, size) in enumerate(zip(grads[0], real, strict=True))
    ]
    for matrix in matrices:
        codec.start(matrix, comm)
    for step in grads:
        for matrix, grad in zip(matrices, step, strict=True):
            matrix.grad[...] = grad[comm.rank]
        codec.sum_(matrices, comm)
        found.append(
            [
                (
                    m.grad.copy(),
                    None if m.error is None else m.error.copy(),
                    m.private.get("server", np.zeros(0)).copy(),
                )
                for m in matrices
            ]
        )
    return found


def exchange(make: Callable[[], Codec], grads: list[Any]) -> list[Any]:
    """Run a codec on thread ranks. Returns [worker][step][matrix] of (sum, error, server)."""
    return run_ranks(len(grads[0][0]), lambda comm: exchange_here(comm, make, grads))


def check_telescoping(make: Callable[[], Codec], grads: list[Any]) -> None:
    """Check after every step: applied sums plus all error memory are the sums of all gradients."""
    found = exchange(make, grads)
    for i, first in enumerate(grads[0]):
        applied, given, shape = 0.0, 0.0, first.shape[1:]
        for step, now in enumerate(grads):
            applied = applied + found[0][step][i][0]
            given = given + now[i].sum(0)
            memory = sum(worker[step][i][1] for worker in found)
            servers = np.concatenate([worker[step][i][2] for worker in found])
            if servers.size:
                assert not servers[math.prod(shape) :].any()
                memory = memory + servers[: math.prod(shape)].reshape(shape)
            most = 1e-12 * np.abs(given).max()
            np.testing.assert_allclose(applied + memory, given, rtol=0, atol=most)
            for worker in found:
                np.testing.assert_array_equal(worker[step][i][0], found[0][step][i][0])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", MAKE)
def test_nothing_is_lost(name: str, workers: int) -> None:
    check_telescoping(MAKE[name], gradients(workers, 6))


@settings(max_examples=12, deadline=None)
@given(
    workers=st.integers(1, 3),
    rows=st.integers(3, 40),
    columns=st.integers(3, 40),
    name=st.sampled_from(sorted(MAKE)),
    seed=SEEDS,
)
def test_nothing_is_lost_at_any_size(
    workers: int, rows: int, columns: int, name: str, seed: int
) -> None:
    check_telescoping(MAKE[name], gradients(workers, 2, [(rows, columns)], seed))


def check_powersgd() -> None:
    """Check that the workers' sum is that of one worker, and exact up to the rank."""
    grads = gradients(3, 1)
    left, right = np.random.default_rng(1).normal(size=(2, 19, 2))
    # Each worker alone has full rank; their sum has rank 2.
    grads[0][0][2] = left[:17] @ right.T - grads[0][0][:2].sum(0)
    together = [[g.sum(0, keepdims=True) for g in step] for step in grads]
    found, alone = exchange(MAKE["powersgd"], grads)[0], exchange(MAKE["powersgd"], together)[0]
    for (a, _, _), (b, _, _) in zip(found[0], alone[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[0][0][0], left[:17] @ right.T, rtol=0, atol=1e-12)


def test_powersgd_depends_on_the_sum_alone() -> None:
    check_powersgd()


def test_powersgd_survives_zero_gradients() -> None:
    grads = gradients(2, 4)
    grads[:2] = [[np.zeros_like(g) for g in step] for step in grads[:2]]
    check_telescoping(MAKE["powersgd"], grads)


SIMULATE: dict[str, tuple[Callable[[], Codec], Callable[[], VirtualSum]]] = {
    "topk": (MAKE["topk"], lambda: VirtualTopK(0.1)),
    "onebit": (OneBit, VirtualOneBit),
    "bf16": (Bf16, VirtualBf16),
}


def check_simulation(name: str, drawn: Any = None) -> None:
    """Compare with the serial simulation; small integers make ties."""
    make, virtual = SIMULATE[name]
    grads = [[np.round(g) for g in step] for step in drawn or gradients(3, 4)]
    found, sums = exchange(make, grads), [virtual() for _ in grads[0]]
    expected = [[add(grad) for add, grad in zip(sums, step, strict=True)] for step in grads]
    for worker in found:
        for step, sums in zip(worker, expected, strict=True):
            for (grad, _, _), total in zip(step, sums, strict=True):
                np.testing.assert_allclose(grad, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SIMULATE)
def test_the_sum_is_that_of_virtual_workers(name: str) -> None:
    check_simulation(name)


SIZES = dict(
    workers=st.integers(2, 5), rows=st.integers(3, 30), columns=st.integers(3, 30), seed=SEEDS
)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(SIMULATE)), **SIZES)
def test_the_sum_is_that_of_virtual_workers_at_any_size(
    name: str, workers: int, rows: int, columns: int, seed: int
) -> None:
    check_simulation(name, gradients(workers, 2, [(rows, columns), (4, 5)], seed))


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(["bf16", *sorted(MAKE)]), **SIZES)
def test_bytes_are_those_of_the_formula_at_any_size(
    name: str, workers: int, rows: int, columns: int, seed: int
) -> None:
    options = ReplicationOptions(compress=name, compress_rank=2, compress_share=0.1)  # type: ignore[arg-type]
    shapes = [(rows, columns), (columns, rows)]
    (step,) = gradients(workers, 1, shapes, seed)

    def rank(comm: Communicator) -> dict[str, int]:
        exchange_here(comm, lambda: codec_of(options, 0), [step])
        return {operation: count for (_, operation), count in ledger().payload().items()}

    expected = codec_of(options).payload(shapes, workers, 8)
    assert run_ranks(workers, rank) == [expected] * workers


@pytest.mark.parametrize("name", MAKE)
def test_padding_has_no_part_in_a_sum(name: str) -> None:
    """Check that rows of padding keep zero sums and memories, and enter no scale.

    The first matrix has two rows of padding, the second one nothing else.
    """
    grads, real = gradients(3, 4), [15 * 19, 0]
    for step in grads:
        for matrix, size in zip(step, real, strict=True):
            matrix.reshape(3, -1)[:, size:] = 0
    found = run_ranks(3, lambda comm: exchange_here(comm, MAKE[name], grads, real))
    for i, size in enumerate(real):
        virtual = VirtualOneBit(size)
        for number, step in enumerate(grads):
            expected = virtual(step[i]).ravel()
            for worker in found:
                total, error, _ = worker[number][i]
                assert not total.ravel()[size:].any() and not error.ravel()[size:].any()
                if name == "onebit":
                    np.testing.assert_allclose(total.ravel(), expected, rtol=0, atol=1e-12)
            servers = np.concatenate([worker[number][i][2] for worker in found])
            assert not servers[size:].any()


def forget(matrix: Matrix) -> Any:
    """Overwrite the memory with the gradient."""
    matrix.error[...] = matrix.grad
    return matrix.error.reshape(-1)


def forget_once(matrix: Matrix) -> Any:
    """Begin a new memory at the third step, as at a new rate."""
    matrix.calls = getattr(matrix, "calls", 0) + 1  # type: ignore[attr-defined]
    return forget(matrix) if matrix.calls == 3 else fed_back(matrix)  # type: ignore[attr-defined]


def shrink(matrix: Matrix) -> Any:
    """Keep the memory of updates, times a rate, beside gradients."""
    matrix.error *= 0.5
    return fed_back(matrix)


def add_behind(codec: Codec, matrices: Any, comm: Communicator) -> None:
    """Compress the gradient alone, and add the memory to the result."""
    kept = [matrix.error.copy() for matrix in matrices]
    for matrix in matrices:
        matrix.error[...] = 0
    SUMS[type(codec)](codec, matrices, comm)
    for matrix, error in zip(matrices, kept, strict=True):
        matrix.grad += error


def take_the_mean(codec: Codec, matrices: Any, comm: Communicator) -> None:
    SUMS[type(codec)](codec, matrices, comm)
    for matrix in matrices:
        matrix.grad /= comm.size


def count_padding(memory: Any, real: int, length: int) -> Any:
    """Divide the scale by the padded length."""
    scale, bits = compress(memory, real, length)
    return scale * real / length, bits


def all_real(matrix: Matrix) -> None:
    """Take padding of a vocabulary for elements."""
    matrix.real = matrix.grad.size


def zero_is_negative(flat: Any, length: int) -> Any:
    bits = np.zeros(length, bool)
    bits[: flat.size] = flat > 0
    return np.packbits(bits)


def drop_duplicates(flat: Any, places: Any, values: Any) -> None:
    flat[places.reshape(-1)] += values.reshape(-1)


def draw_per_rank(codec: PowerSGD, matrix: Matrix, comm: Communicator) -> None:
    codec.seed += comm.rank
    start(codec, matrix, comm)


def divide_by_norms(matrix: Any) -> Any:
    """Orthonormalise by Gram and Schmidt without a guard."""
    out = matrix.copy()
    with np.errstate(invalid="ignore"):
        for i in range(out.shape[1]):
            out[:, i] -= out[:, :i] @ (out[:, :i].T @ out[:, i])
            out[:, i] /= np.linalg.norm(out[:, i])
    return out


def last_of_equal(flat: Any, count: int) -> Any:
    return np.sort(np.argsort(np.abs(flat), kind="stable")[-count:]).astype(np.int32)


compress, start, fed_back = OneBit._compress, PowerSGD.start, Matrix.fed_back
SUMS: dict[type, Any] = {kind: kind.sum_ for kind in (Bf16, OneBit, PowerSGD, TopK)}
PLANTED: list[tuple[Any, str, Any, Callable[[], None]]] = [
    (Matrix, "fed_back", forget, lambda: test_nothing_is_lost("powersgd", 3)),
    (Matrix, "fed_back", forget, lambda: test_nothing_is_lost("topk", 3)),
    (Matrix, "fed_back", forget, lambda: test_nothing_is_lost("onebit", 3)),
    *(
        (Matrix, "fed_back", fault, lambda name=name: test_nothing_is_lost(name, 3))
        for fault, name in [(forget_once, "topk"), (forget_once, "onebit"), (shrink, "powersgd")]
    ),
    (TopK, "sum_", add_behind, lambda: check_simulation("topk")),
    (OneBit, "sum_", add_behind, lambda: check_simulation("onebit")),
    (PowerSGD, "sum_", add_behind, lambda: test_nothing_is_lost("powersgd", 3)),
    *(
        (kind, "sum_", take_the_mean, lambda name=name: test_nothing_is_lost(name, 3))
        for kind, name in [(TopK, "topk"), (OneBit, "onebit"), (PowerSGD, "powersgd")]
    ),
    (Bf16, "sum_", take_the_mean, lambda: check_simulation("bf16")),
    (OneBit, "_compress", staticmethod(count_padding), lambda: check_simulation("onebit")),
    (Matrix, "__post_init__", all_real, lambda: test_padding_has_no_part_in_a_sum("onebit")),
    (codecs, "packed_signs", zero_is_negative, lambda: test_nothing_is_lost("onebit", 3)),
    (codecs, "add_at", drop_duplicates, lambda: check_simulation("topk")),
    (codecs, "largest", last_of_equal, lambda: check_simulation("topk")),
    (PowerSGD, "start", draw_per_rank, check_powersgd),
    (codecs, "orthonormal", lambda matrix: matrix, check_powersgd),
    (codecs, "orthonormal", divide_by_norms, test_powersgd_survives_zero_gradients),
]


@pytest.mark.parametrize(("kind", "name", "fault", "law"), PLANTED)
def test_planted_faults_are_seen(
    kind: Any, name: str, fault: Any, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    law()
    monkeypatch.setattr(kind, name, fault)
    with pytest.raises(AssertionError):
        law()


@given(size=st.integers(1, 300), workers=st.integers(1, 9), seed=st.integers(0, 9))
def test_signs_round_trip(size: int, workers: int, seed: int) -> None:
    flat = np.random.default_rng(seed).integers(-2, 3, size).astype(np.float32)
    length = codecs.padded(size, workers)
    assert length % (8 * workers) == 0 and 0 <= length - size < 8 * workers
    bits = codecs.packed_signs(flat, length)
    assert bits.nbytes == length // 8
    signs = codecs.unpacked_signs(bits, flat.dtype)[:size]
    np.testing.assert_array_equal(signs, np.where(flat >= 0, 1, -1))


@given(size=st.integers(1, 200), share=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_the_largest_are_those_of_a_stable_sort(size: int, share: float, seed: int) -> None:
    flat = np.random.default_rng(seed).integers(-4, 5, size).astype(np.float64)
    count = TopK(share).count(size)
    expected = np.sort(np.argsort(-np.abs(flat), kind="stable")[:count])
    np.testing.assert_array_equal(codecs.largest(flat, count), expected)


@needs_mpirun
@pytest.mark.slow
def test_processes_sum_as_virtual_workers() -> None:
    done = mpirun(3, [str(Path(__file__).with_name("codec_program.py"))], timeout=120)
    assert done.returncode == 0 and done.output.count("same ") == 4, done.output
