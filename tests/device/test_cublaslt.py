"""cuBLASLt arguments: a stand-in for the library reads them and multiplies in NumPy.

The real library, where it is installed, accepts the descriptors.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels.matmul import cublaslt
from minillm.kernels.matmul.cublaslt import CublasLt, Key, Matrix, matmul, matmul_first
from standin.cuda import _TYPES, _matrix
from standin.install import installed
from test_matmul import TYPES, made

from minillm import kernels
from minillm.base.arrays import to_device, to_host


class FakeLibrary:
    """Fake cuBLASLt: its functions over descriptors that are rows of a table.

    `algorithms` are what the heuristic finds: number -> milliseconds of a product. A negative one
    fails. `clock` counts the time of the products.
    """

    def __init__(self) -> None:
        self.table: dict[int, Any] = {}
        self.algorithms = {77: 1.0}
        self.ran: list[int] = []
        self.clock = 0.0
        self.calls: Counter[str] = Counter()
        self.epilogues: Counter[int] = Counter()

    def _new(self, out: Any, value: Any) -> int:
        number = len(self.table) + 1
        self.table[number] = value
        out._obj.value = number
        return 0

    def cublasLtCreate(self, out: Any) -> int:
        return self._new(out, "handle")

    def cublasLtMatrixLayoutCreate(
        self, out: Any, dtype: Any, rows: Any, columns: Any, leading: Any
    ) -> int:
        return self._new(out, (rows.value, columns.value, leading.value, dtype.value))

    def cublasLtMatmulDescCreate(self, out: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (68, 0)
        return self._new(out, {})

    def cublasLtMatmulPreferenceCreate(self, out: Any) -> int:
        return self._new(out, {})

    def _set(self, target: Any, attribute: Any, value: Any, size: Any) -> int:
        assert size.value == ctypes.sizeof(value._obj)
        self.table[target.value][attribute.value] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatmulPreferenceSetAttribute = _set

    def cublasLtMatmulAlgoGetHeuristic(self, handle: Any, desc: Any, *rest: Any) -> int:
        self.calls["heuristic"] += 1
        *layouts, wishes, wanted, found, count = rest
        kept, with_ = self.table[wishes.value], self.table[desc.value]
        assert with_.get(8) in ((None,) if with_[7] == 1 else (64, 128, 256)), (
            "the vector's alignment is known by now"
        )
        assert kept[1] == 32 << 20 and all(
            kept[a] in (2, 4, 8, 16, 32, 64, 128, 256) for a in (5, 6, 7, 8)
        )
        assert len(layouts) == 4 and layouts[2].value == layouts[3].value
        chosen = list(self.algorithms)[: wanted.value]
        for each, number in zip(found, chosen, strict=False):
            each.algo[0] = number
        count._obj.value = len(chosen)
        return 0

    def cublasLtMatmul(self, handle: Any, desc: Any, alpha: Any, *rest: Any) -> int:
        self.calls["products"] += 1
        a, A, b, B, beta, c, C, d, D, algo, workspace, size, _ = rest
        assert (
            c.value == d.value
            and C.value == D.value
            and algo._obj[0] in self.algorithms
            and workspace.value % 256 == 0
            and size.value == 32 << 20
        )
        number = algo._obj[0]
        self.ran.append(number)
        self.clock += abs(self.algorithms[number])
        if self.algorithms[number] < 0:
            return 15
        with_, (m, n, ldc, c_type) = self.table[desc.value], self.table[C.value]
        left, right = (
            _matrix(
                x.value, *self.table[layout.value][:3], _TYPES[self.table[layout.value][3]]
            ).astype(np.float32)
            for x, layout in ((a, A), (b, B))
        )
        target = _matrix(c.value, m, n, ldc, _TYPES[c_type])
        result = alpha._obj.value * (
            (left.T if with_[3] else left) @ (right.T if with_[4] else right)
        )
        if beta._obj.value:
            result += beta._obj.value * target.astype(np.float32)
        self.epilogues[with_[7]] += 1
        if with_[7] == 4:
            result += _matrix(with_[8], m, 1, m, _TYPES[c_type]).astype(np.float32)
        elif with_[7] == 512:
            _matrix(with_[8], n, 1, n, _TYPES[c_type])[:, 0] = (right.T if with_[4] else right).sum(
                0
            )
        else:
            assert with_[7] == 1
        target[...] = result.astype(target.dtype)
        return 0


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    with installed() as module:
        library = FakeLibrary()

        def stopwatch(call: Callable[[], None]) -> float:
            before = library.clock
            call()
            return library.clock - before

        def allocate(size: int) -> Any:
            return module.zeros(size, np.uint8)

        opened = {
            timed: CublasLt(library, allocate, stopwatch if timed else None)
            for timed in (True, False)
        }
        monkeypatch.setattr(cublaslt, "_opened", lambda device, timed: opened[timed])
        yield library


PRODUCTS = cublaslt.REPEATS + 1  # of an algorithm that is timed


@pytest.mark.parametrize(
    ("algorithms", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0}, 2),
        ({1: 3.0, 2: -1.0, 3: 2.0}, 3),  # the second fails
        ({n: 10.0 - n for n in range(1, 10)}, 8),  # the ninth, the fastest, is not asked for
        ({1: 1.0, 2: 1.0}, 1),  # the heuristic's order decides between equals
    ],
)
def test_the_fastest_algorithm_of_a_shape_is_kept(
    library: FakeLibrary, algorithms: dict[int, float], kept: int
) -> None:
    import cupy

    library.algorithms = algorithms
    x, weight = cupy.ones((4, 8), np.float32), cupy.ones((3, 8), np.float32)
    out, bias = cupy.ones((4, 3), np.float32), cupy.ones(3, np.float32)
    matmul(x, weight.T, out, True)  # accumulates once, whatever was timed
    assert (to_host(out) == 9).all()
    asked = list(algorithms)[:8]
    timed = [n for n in asked for _ in range(PRODUCTS if algorithms[n] > 0 else 1)]
    assert library.ran == [*timed, kept]
    matmul(x, weight.T, out, True)
    assert library.ran == [*timed, kept, kept] and (to_host(out) == 17).all()
    sums = cupy.empty(4, np.float32)
    matmul(x, weight.T, out, True, sums=sums)
    assert (to_host(out) == 25).all() and (to_host(sums) == 8).all()
    assert (to_host(matmul(x, weight.T, bias=bias)) == 9).all()
    library.ran.clear()
    matmul_first(x, weight.T, out, True)
    assert library.ran == [1]


def test_without_memory_for_a_try_the_first_algorithm_runs(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    def short(size: int) -> Any:
        raise MemoryError

    library.algorithms = {1: 3.0, 2: 1.0}
    monkeypatch.setattr(cublaslt._opened(0, True), "_allocate", short)  # type: ignore[call-arg]
    x = cupy.ones((2, 2), np.float32)
    assert (to_host(matmul(x, x)) == 2).all() and library.ran == [1]


def test_a_shape_without_an_algorithm_names_the_way_out(library: FakeLibrary) -> None:
    import cupy

    library.algorithms = {}
    x = cupy.ones((2, 2), np.float32)
    with pytest.raises(RuntimeError, match=r"no algorithm for Key.*use.matmul='cuda:cublas'"):
        matmul(x, x)


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 4, 6), (6, 4, 1), (33, 8, 17)])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["plain", "bias", "accumulate", "sums"])
def test_every_layout(
    shape: tuple[int, int, int], left: bool, right: bool, dtype: str, way: str
) -> None:
    import cupy

    M, K, N = shape
    rng = np.random.default_rng(0)
    a, a64 = made(rng, (M, K), dtype, left, cupy)
    b, b64 = made(rng, (K, N), dtype, right, cupy)
    bias = rng.standard_normal(N).astype(TYPES[dtype])
    start = rng.standard_normal((M, N)).astype(np.float32)
    want = a64 @ b64
    sums = cupy.empty(M, np.float32) if way == "sums" else None
    if way in ("accumulate", "sums"):
        found, want = matmul(a, b, to_device(start, cupy), True, sums=sums), want + start
    elif way == "bias":
        found, want = matmul(a, b, bias=to_device(bias, cupy)), want + bias.astype(np.float64)
    else:
        found = matmul(a, b)
    if sums is not None:
        np.testing.assert_allclose(to_host(sums), a64.sum(1), rtol=1e-5, atol=1e-5)
    tolerance = (
        1e-6
        if way in ("accumulate", "sums") or dtype == "float32"
        else float(ml_dtypes.finfo(dtype).eps)
    )
    assert np.abs(to_host(found).astype(np.float64) - want).max() <= 2 * tolerance * max(
        1.0, np.abs(want).max()
    )


def test_sums_of_another_dtype_than_the_result_and_of_an_empty_product(
    library: FakeLibrary,
) -> None:
    import cupy

    sums, ones = cupy.empty(4, np.float32), to_device(np.ones((4, 8), TYPES["bfloat16"]), cupy)
    matmul(ones, ones[:3].T, sums=sums)
    assert (to_host(sums) == 8).all() and library.epilogues == {1: 1}
    matmul(ones, ones[:0].T, sums=sums)
    assert (to_host(sums) == 8).all()
    with pytest.raises(ValueError, match=r"sums of 4 rows.* not into \(3,\) of float32"):
        matmul(ones, ones[:3].T, sums=sums[:3])


def test_a_bias_of_another_dtype_than_the_result() -> None:
    import cupy

    bias, out = (
        to_device(np.array([1, 2, 3], TYPES["bfloat16"]), cupy),
        cupy.zeros((4, 3), np.float32),
    )
    ones = to_device(np.ones((4, 8), TYPES["bfloat16"]), cupy)
    assert (to_host(matmul(ones, ones[:3].T, out, bias=bias)) == [9, 10, 11]).all()


def test_plans_are_kept_and_biases_are_not(library: FakeLibrary) -> None:
    import cupy

    x = cupy.ones((4, 8), np.float32)
    weight = cupy.ones((3, 8), np.float32)
    for value in (1.0, 2.0):
        bias = cupy.ones(3, np.float32) * value
        assert (to_host(matmul(x, weight.T, bias=bias)) == 8 + value).all()
    matmul(x, weight.T)
    assert library.calls == {"heuristic": 2, "products": 3}
    with pytest.raises(ValueError, match="takes no bias"):
        matmul(x, weight.T, cupy.zeros((4, 3), np.float32), True, cupy.ones(3, np.float32))
    assert not to_host(matmul(cupy.ones((2, 0), np.float32), cupy.ones((0, 2), np.float32))).any()


def test_a_step_makes_its_plans_once(library: FakeLibrary) -> None:
    from test_step import trainer

    def losses() -> list[float]:
        one = trainer(None)
        reports = [one.step(0)]
        made = library.calls["heuristic"]
        reports += [one.step(1), one.step(2)]
        assert library.calls["heuristic"] == made
        return [report.loss for report in reports]

    plain = losses()
    with kernels.use(matmul="cuda:cublaslt"):
        found = losses()
    layers, microbatches, steps = 2, 2, 3
    every = layers * microbatches * steps
    # Of a layer's four products all have a bias: added forward, and its gradient made with that of
    # the weight.
    assert library.epilogues[4] == library.epilogues[512] == 4 * every
    assert library.epilogues[1] > 4 * every  # gradients of inputs, and the head
    np.testing.assert_allclose(
        found, plain, rtol=0.02
    )  # a bias is rounded with its product, not after it


def test_a_status_is_an_error(library: FakeLibrary) -> None:
    import cupy

    library.cublasLtMatmul = lambda *args: 15  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cublasLtMatmul returned status 15"):
        matmul(cupy.ones((2, 2), np.float32), cupy.ones((2, 2), np.float32))


def test_the_real_library_takes_our_descriptors() -> None:
    """Check descriptors, which are host memory, against the real library without a device."""
    try:
        real = ctypes.CDLL(str(cublaslt.library_file()))
    except OSError as error:
        pytest.skip(f"cuBLASLt is not installed: {error}")
    lt = CublasLt.__new__(CublasLt)
    lt.library = real
    matrix = Matrix(64, 32, 64, 14, 256)
    assert lt.layout(matrix).value and lt.product((True, False), cublaslt.WITH_BIAS).value
    assert lt.wishes(Key(matrix, matrix, matrix, (False, False), 1)).value
