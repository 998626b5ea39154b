"""C extension: its pool of threads, what it refuses, and that all instruction sets agree."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from minillm.kernels import native
from minillm.kernels.registry import KernelUnavailable

from minillm import kernels

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))

c = native.VARIANTS[-1].functions


def squares(pool: object, x: np.ndarray) -> float:
    total = np.empty(1)
    c.sum_of_squares(pool, x, total, x.size)
    return float(total[0])


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_a_pool_covers_every_item_once(threads: int) -> None:
    pool = native.extension.Pool(threads)
    for size in (0, 1, 1000, 16384 * threads, 16384 * threads + 5):
        x = np.ones(size, np.float32)
        assert squares(pool, x) == size


def operations(threads: int) -> list[bytes]:
    """Return the results of operations whose work a pool cuts, in a context of `threads`."""
    rng = np.random.default_rng(7)
    x, grad = (rng.standard_normal((1000, 96)).astype(np.float32) for _ in range(2))
    weight, long = x[0].copy(), rng.standard_normal(200_003).astype(np.float32)
    q, k, v = (rng.standard_normal((3, 70, 5, 32)).astype(np.float32) for _ in range(3))
    with kernels.threads(threads):
        y, mean, rstd = kernels.layernorm_forward(x, weight, weight, 1e-5)[:3]
        found = [
            y,
            *kernels.layernorm_backward(grad, x, weight, mean, rstd),
            kernels.matmul(x, np.ascontiguousarray(grad.T)),
            kernels.matmul(x.T, grad),
            kernels.gelu_forward(long, "tanh"),
            *kernels.attention_forward(q, k, v, scale=0.2, visibility=kernels.Visibility()),
            np.float64(kernels.sum_of_squares(long)),
        ]
    return [np.ascontiguousarray(array).tobytes() for array in found]


@pytest.mark.slow
def test_pieces_may_run_on_any_thread() -> None:
    expected = operations(3)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            sum(range(1000))

    others = [threading.Thread(target=disturb) for _ in range(4)]
    for other in others:
        other.start()
    try:
        for _ in range(20):
            assert operations(3) == expected
    finally:
        stop.set()
        for other in others:
            other.join()


LIMITED = """
import hashlib, os, resource, sys
import numpy as np
from minillm import kernels
x = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
y = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
def products():
    with kernels.threads(3), kernels.use(matmul=sys.argv[1]):
        return kernels.sum_of_squares(x), kernels.matmul(y, y.T.copy()).tobytes()
if sys.argv[2] == "limited":
    if os.getuid() == 0:
        os.setuid(54321)  # the limit does not bind root
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
print(products()[0], hashlib.sha256(products()[1]).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux alone")
@pytest.mark.parametrize(
    "matmul", ["c", "numpy", *(["c:blas"] if native.blas_unavailable is None else [])]
)
@pytest.mark.slow
def test_a_pool_without_its_threads_gives_the_same_results(matmul: str) -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", LIMITED, matmul, how], capture_output=True, text=True, timeout=60
        )
        for how in ("free", "limited")
    ]
    assert all(run.returncode == 0 for run in runs), runs[1].stderr
    assert runs[0].stdout == runs[1].stdout and not runs[0].stderr
    assert runs[1].stderr.count("\n") == 1
    assert "only 1 of 3 threads could be started" in runs[1].stderr


def test_workers_that_fell_asleep_wake_up() -> None:
    pool = native.extension.Pool(4)
    x = np.ones(1 << 18, np.float32)
    for pause in (0.0, 0.002, 0.02):
        for _ in range(20):
            assert squares(pool, x) == x.size
            threading.Event().wait(pause)


def lying_across(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T).T


def pages_apart(x: np.ndarray) -> np.ndarray:
    """Return the values of `x` in rows that begin a whole number of pages apart."""
    wide = np.full((len(x), (x.shape[1] // 1024 + 1) * 1024), np.nan, np.float32)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("variant", [v.name for v in native.VARIANTS])
@pytest.mark.parametrize(
    ("M", "K", "N"), [(20, 2500, 24), (200, 700, 450), (31, 40, 1000), (1000, 40, 31), (9, 1, 1)]
)
def test_a_product_has_the_same_bits_on_any_number_of_threads(
    variant: str, M: int, K: int, N: int
) -> None:
    if any(v.name == variant and v.unavailable for v in native.VARIANTS):
        pytest.skip(f"this processor has no {variant}")
    rng = np.random.default_rng(0)
    a, b, bias, c = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, N), N, (M, N + 6))
    )
    for threads in (1, 2, 3, 8, 64):
        with kernels.use(matmul=f"c:{variant}"), kernels.threads(threads):
            lefts, rights = (a, lying_across(a), pages_apart(a)), (b, lying_across(b))
            found = [kernels.matmul(left, right, bias=bias) for left in lefts for right in rights]
            out = c.copy()
            kernels.matmul(a, b, out=out[:, :N], accumulate=True)
        if threads == 1:
            once = found[0]
            assert np.allclose(once, a.astype(np.float64) @ b + bias, atol=1e-3)
        assert all(np.array_equal(once, product) for product in found)
        assert np.allclose(out[:, :N], c[:, :N] + a @ b, atol=1e-3) and np.array_equal(
            out[:, N:], c[:, N:]
        )


def test_pools_of_several_python_threads_work_at_once() -> None:
    totals: list[float] = []

    def run() -> None:
        with kernels.threads(3):
            totals.extend(kernels.sum_of_squares(np.ones(100_000, np.float32)) for _ in range(50))

    ranks = [threading.Thread(target=run) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert totals == [100_000.0] * 200


def test_a_pool_that_is_dropped_ends_its_threads() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

    before = count()
    pool = native.extension.Pool(5)
    assert count() >= 5 or not before
    del pool
    gc.collect()
    deadline = time.monotonic() + 60
    while count() > before and time.monotonic() < deadline:
        time.sleep(0.001)  # the system forgets a thread a moment after it was joined
    assert count() <= before


def test_a_forked_child_computes_without_the_threads() -> None:
    pool = native.extension.Pool(3)
    x = np.ones(1 << 17, np.float32)
    squares(pool, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if squares(pool, x) == x.size else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wrong_arguments_are_refused() -> None:
    pool, x, out = (
        native.extension.Pool(1),
        np.ones((2, 3), np.float32),
        np.zeros((2, 3), np.float32),
    )
    with pytest.raises(TypeError, match="first argument is a Pool"):
        c.relu_forward(x, out, 6)
    with pytest.raises(TypeError, match="takes a pool and"):
        c.relu_forward(pool, x, out)
    with pytest.raises(TypeError, match="takes a pool and"):
        c.relu_forward(pool, x, out, 6, 7)
    with pytest.raises(TypeError, match="format 'd'"):
        c.relu_forward(pool, x.astype(np.float64), out, 6)
    with pytest.raises(ValueError, match="contiguous"):
        c.relu_forward(pool, x.T, out, 6)
    with pytest.raises(TypeError, match="argument 0 has 2 dims, not 4"):
        c.rope(pool, out, x, x, 1, 1, 2, 3, False)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|writable"):
        c.relu_forward(pool, x, out, 6)
    with pytest.raises(ValueError, match="at least 1"):
        native.extension.Pool(0)


def test_normals_have_the_bits_of_the_reference() -> None:
    indices = np.random.default_rng(3).integers(0, 2**64, 200_000, dtype=np.uint64)
    found = kernels.random_normal(2**64 - 5, indices)
    with kernels.use(random_normal="numpy"):
        assert found.tobytes() == kernels.random_normal(2**64 - 5, indices).tobytes()


def test_dropout_keeps_what_the_reference_keeps() -> None:
    x, address = (
        np.ones((3, 5, 70), np.float32),
        (99, np.array([4, 0, 7]), np.arange(5), np.arange(70)),
    )
    found = kernels.dropout_forward(x, 0.3, *address)
    with kernels.use(dropout="numpy"):
        assert np.array_equal(found, kernels.dropout_forward(x, 0.3, *address))


def test_choices_in_words() -> None:
    assert kernels.choices_from("auto") == {}
    assert kernels.choices_from("attention=numpy, matmul=c:baseline") == {
        "attention": "numpy",
        "matmul": "c:baseline",
    }
    assert (
        "softmax_forward" not in kernels.choices_from("c")
        and kernels.choices_from("c")["add"] == "c"
    )
    with pytest.raises(KernelUnavailable, match="no such backend"):
        kernels.choices_from("fortran")
