"""Emulator: faults are reported at their line, and instructions do what the GPU's do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels import emulator, registry
from minillm.kernels.emulator import EmulatorError, compiler, emulate, heatmap, launch
from minillm.kernels.emulator.__main__ import main
from minillm.kernels.emulator.compiler import compile_text, kernels_in
from minillm.kernels.emulator.examples import EXAMPLES

pytestmark = pytest.mark.skipif(
    emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
)

CUDA = Path(__file__).resolve().parent / "cuda"
FAULTS, INSTRUCTIONS = CUDA / "faults.cu", CUDA / "instructions.cu"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def floats(n: int) -> np.ndarray:
    return np.zeros(n, np.float32)


# ---- faults


class Fault(NamedTuple):
    """Kernel of faults.cu: its launch, the name of the report, and what else it says.

    Some orders of the threads give another report, which `kinds` allows.
    """

    kernel: str
    kinds: str
    says: str
    args: Callable[[], tuple[Any, ...]]
    block: int = 32
    grid: int = 1
    shared_bytes: int = 0


FAULT_LIST = [
    Fault(
        "read_past_array",
        "out of bounds",
        "reads 4 bytes at element 32 of x: float32 [32], which has 32",
        lambda: (floats(32), floats(32)),
    ),
    Fault(
        "write_before_array",
        "out of bounds",
        "writes 4 bytes that begin 4 bytes before the start of y",
        lambda: (floats(32),),
    ),
    Fault("null_pointer", "out of bounds", "a null pointer", lambda: (None, floats(32))),
    Fault(
        "past_dynamic_shared",
        "out of bounds",
        "byte 128 of dynamic shared memory",
        lambda: (floats(64),),
        33,
        1,
        128,
    ),
    Fault(
        "past_static_shared",
        "out of bounds",
        "index 32 of an array of type 'float",
        lambda: (floats(32),),
    ),
    Fault(
        "past_registers",
        "out of bounds",
        "index 4 of an array of type 'float",
        lambda: (floats(32), np.int32(5)),
    ),
    Fault(
        "misaligned_vector",
        "misaligned access",
        "16 bytes at once at element",
        lambda: (floats(200), floats(200)),
    ),
    Fault(
        "uninitialised_shared",
        "uninitialised read",
        "byte 128 of shared array tile",
        lambda: (floats(32),),
    ),
    Fault(
        "uninitialised_global",
        "uninitialised read",
        "element 0 (byte 0) of y: float32 [32]",
        lambda: (floats(32), floats(32)),
    ),
    Fault(
        "left_over_from_block_before",
        "uninitialised read",
        "shared array tile",
        lambda: (floats(64),),
        32,
        2,
    ),
    Fault(
        "read_without_barrier",
        "race|uninitialised read",
        "shared array tile",
        lambda: (floats(128),),
        128,
    ),
    Fault("write_after_read", "race", "no barrier lies between", lambda: (floats(64),), 64),
    Fault(
        "barrier_of_the_wrong_warp",
        "race|uninitialised read",
        "shared array tile",
        lambda: (floats(64),),
        64,
    ),
    Fault(
        "blocks_share_a_sum",
        "race between blocks",
        "blocks have no order",
        lambda: (floats(1),),
        32,
        2,
    ),
    Fault(
        "barrier_not_reached", "deadlock", "threads 40-63 have returned", lambda: (floats(64),), 64
    ),
    Fault(
        "divergent_barriers", "divergent instruction", "lanes of one warp", lambda: (floats(32),)
    ),
    Fault(
        "lane_missing_in_shuffle",
        "deadlock",
        "threads 0-4, 6-31 wait in __shfl_xor_sync",
        lambda: (floats(32),),
    ),
    Fault("lane_outside_its_mask", "wrong mask", "in which it is not", lambda: (floats(32),)),
    Fault(
        "shuffle_from_absent_lane", "wrong mask", "which does not take part", lambda: (floats(32),)
    ),
    Fault(
        "copy_not_waited_for",
        "read before it arrived",
        "no thread has waited for it",
        lambda: (floats(128), floats(32)),
    ),
    Fault(
        "copy_waited_for_by_another",
        "race|uninitialised read|read before it arrived",
        "array tile",
        lambda: (floats(128), floats(32)),
    ),
    Fault(
        "one_group_too_few",
        "read before it arrived",
        "no thread has waited for it",
        lambda: (floats(128), floats(32)),
    ),
    Fault(
        "ldmatrix_of_a_bad_row",
        "misaligned access",
        "16 bytes at once at byte",
        lambda: (floats(32),),
    ),
]


def line_of(kernel: str) -> int:
    lines = FAULTS.read_text(encoding="utf-8").splitlines()
    return next(
        number for number, line in enumerate(lines, 1) if line.endswith(f"// FAULT {kernel}")
    )


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("fault", FAULT_LIST, ids=lambda fault: fault.kernel)
def test_a_fault_is_reported_at_its_line(fault: Fault, order: str) -> None:
    args = fault.args()
    unwritten = args[:1] if fault.kernel == "uninitialised_global" else ()
    with pytest.raises(EmulatorError) as caught:
        launch(
            FAULTS,
            fault.kernel,
            {},
            (fault.grid,),
            (fault.block,),
            args,
            fault.shared_bytes,
            order=order,
            unwritten=unwritten,
        )
    report = str(caught.value)
    assert re.match(rf"({fault.kinds}) in {fault.kernel} ", report), report
    assert re.search(rf"(faults\.cu:|at line ){line_of(fault.kernel)}\b", report), report
    if order == "round robin":
        assert fault.says in report


@pytest.mark.parametrize(
    "name", ["read_past_array", "past_static_shared", "read_without_barrier", "barrier_not_reached"]
)
def test_clang_finds_the_same_faults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not on this machine")
    monkeypatch.setattr(compiler, "_CANDIDATES", ("clang++",))
    caches = compiler.host_compiler, compiler._compile_host
    for cache in caches:
        cache.cache_clear()
    try:
        test_a_fault_is_reported_at_its_line(
            next(fault for fault in FAULT_LIST if fault.kernel == name), "round robin"
        )
    finally:
        for cache in caches:
            cache.cache_clear()


def test_threads_that_want_the_same_library_compile_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made, cached = tmp_path / "one.cu", [], compiler.cached
    source.write_text('extern "C" __global__ void one(float* x) { *x = 1; }\n')

    def made_here(suffix: str, key: Any, make: Callable[[Path], object]) -> Path:
        if suffix != ".so":
            return cached(suffix, key, make)
        made.append(tmp_path / f"{len(made)}.so")
        make(made[-1])
        return made[-1]

    monkeypatch.setattr(compiler, "cached", made_here)
    x = floats(1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: launch(source, "one", {}, (1,), (1,), (x,), run=False), range(8)))
    assert x[0] == 0 and len(made) == 1
    launch(source, "one", {}, (1,), (1,), (x,))
    assert x[0] == 1 and len(made) == 1


def test_every_kernel_of_the_file_is_tried() -> None:
    assert set(kernels_in(FAULTS.read_text(encoding="utf-8"))) == {
        fault.kernel for fault in FAULT_LIST
    }


def test_a_report_names_block_thread_and_line() -> None:
    with pytest.raises(EmulatorError) as caught:
        launch(FAULTS, "left_over_from_block_before", {}, (2,), (32,), (floats(64),))
    assert str(caught.value) == (
        "uninitialised read in left_over_from_block_before (cuda/faults.cu), order round robin\n"
        "  block 1, thread 0: reads byte 0 of shared array tile, which nothing has written in this "
        "block\n"
        f"  at tests/kernels/cuda/faults.cu:{line_of('left_over_from_block_before')}: "
        "y[threadIdx.x + 32 * blockIdx.x] = tile[threadIdx.x];  // FAULT "
        "left_over_from_block_before"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((floats(32),), "takes 2 arguments"),
        ((floats(32), np.float32(1)), "is of another type"),
        ((floats(32), 5), "wrap numbers as NumPy scalars"),
        ((floats(32), np.int64(5)), "is of another type"),
        ((np.int32(0), np.int32(5)), "is of another type"),
        ((np.zeros(32, BFLOAT16), np.int32(5)), "elements have 2 bytes, not 4"),
    ],
)
def test_arguments_of_another_type_are_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        launch(FAULTS, "past_registers", {}, (1,), (32,), args)


def test_a_block_beyond_its_launch_bounds_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text(
        "#define WARPS 2\n"
        'extern "C" __global__ void __launch_bounds__(32 * (WARPS), 1) two(float* x) '
        "{ x[threadIdx.x] = 1; }\n"
    )
    x = floats(96)
    launch(source, "two", {}, (1,), (64,), (x,))
    assert x[:64].tolist() == [1] * 64
    with pytest.raises(EmulatorError, match=r"96 threads; its __launch_bounds__ .* 64"):
        launch(source, "two", {}, (1,), (96,), (x,))


def test_a_launch_that_no_gpu_takes_is_refused() -> None:
    with pytest.raises(EmulatorError, match="a block has 1 to 1024"):
        launch(FAULTS, "past_registers", {}, (1,), (1056,), (floats(32), np.int32(4)))
    with pytest.raises(EmulatorError, match="bytes of shared memory"):
        launch(FAULTS, "past_registers", {}, (1,), (32,), (floats(32), np.int32(4)), 300_000)
    with pytest.raises(EmulatorError, match="has no kernel 'nothing'"):
        launch(FAULTS, "nothing", {}, (1,), (32,), ())
    with pytest.raises(ValueError, match="there is no order 'best'"), emulate(order="best"):
        pass


def test_after_a_report_the_next_launch_is_a_fresh_one() -> None:
    with pytest.raises(EmulatorError):
        launch(FAULTS, "past_registers", {}, (1,), (32,), (floats(32), np.int32(5)))
    y = floats(32)
    launch(FAULTS, "past_registers", {}, (1,), (32,), (y, np.int32(4)))
    assert (y == 10).all()


def test_a_view_ends_where_its_last_element_does() -> None:
    whole = np.zeros((8, 8), np.float32)
    with pytest.raises(EmulatorError, match=r"element 30 of x: float32 \[4, 6\], which has 30"):
        launch(FAULTS, "null_pointer", {}, (1,), (32,), (whole[:4, :6], floats(32)))


# ---- instructions


def run(
    kernel: str, *args: Any, block: int = 32, grid: int = 1, shared_bytes: int = 0, **defines: str
) -> None:
    """Launch a kernel of instructions.cu under every order; the last result stays in the arrays."""
    for order in emulator.ORDERS:
        launch(INSTRUCTIONS, kernel, defines, (grid,), (block,), args, shared_bytes, order=order)


def test_reductions_reach_all_threads() -> None:
    x = np.random.default_rng(0).integers(-100, 100, 96).astype(np.float32)
    sums, maxima, results = floats(96), floats(96), np.zeros((96, 2), np.float32)
    run("reductions", x, sums, maxima, results, block=96)
    np.testing.assert_array_equal(sums, x.reshape(3, 32).sum(1).repeat(32))
    np.testing.assert_array_equal(maxima, x.reshape(3, 32).max(1).repeat(32))
    np.testing.assert_array_equal(results, np.tile([x.sum(), x.max()], (96, 1)))


def test_shuffles_read_the_lane_they_name() -> None:
    x, y = np.arange(100, 132, dtype=np.int32), np.zeros((6, 32), np.int32)
    run("shuffles", x, y)
    t = np.arange(32)
    down8 = np.where(t % 8 + 3 < 8, t + 3, t)
    for row, lanes in zip(
        y,
        [
            7 * t % 32,
            t ^ 5,
            np.where(t < 29, t + 3, t),
            np.where(t < 3, t, t - 3),
            down8,
            t // 8 * 8 + 2,
        ],
        strict=True,
    ):
        np.testing.assert_array_equal(row, x[lanes])


@pytest.mark.parametrize(
    "x", [np.arange(-40, 24), np.full(64, 3), np.full(64, -3)], ids=["some", "all", "none"]
)
def test_votes(x: np.ndarray) -> None:
    x, y = x.astype(np.int32), np.zeros((6, 64), np.uint32)
    run("votes", x, y, block=64)
    yes = (x > 0).reshape(2, 32)
    ballots = (yes * (1 << np.arange(32, dtype=np.uint64))).sum(1)
    for row, want in zip(y[:3], [ballots, yes.any(1), yes.all(1)], strict=True):
        np.testing.assert_array_equal(row, want.astype(np.uint32).repeat(32))
    np.testing.assert_array_equal(
        y[3:], np.array([yes.any(), yes.all(), yes.sum()])[:, None].repeat(64, 1)
    )


def test_atomics_work_between_threads_and_blocks() -> None:
    for order in emulator.ORDERS:
        counters, places = np.zeros(5, np.int32), np.zeros(192, np.uint32)
        launch(INSTRUCTIONS, "atomics", {}, (3,), (64,), (counters, places), order=order)
        assert counters[:4].tolist() == [192, -3 * 63 * 32, 53, 7]
        np.testing.assert_array_equal(np.sort(places), np.arange(192))


def test_conversions_round_to_nearest_even() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 6000, dtype=np.uint32)
    near = np.float32(1) + np.arange(-40, 40, dtype=np.float32) * np.float32(2**-12)  # around ties
    special = np.array(
        [
            0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            65504,
            65519.9,
            65520,
            6e-8,
            2.9e-8,
            6.1e-5,
            1e-45,
            3.4e38,
        ],
        np.float32,
    )
    x = np.concatenate(
        [
            bits.view(np.float32),
            near,
            special,
            np.random.default_rng(2).standard_normal(2000).astype(np.float32) * 1e-5,
        ]
    )
    bf, half, back = (
        np.zeros(x.size, np.uint16),
        np.zeros(x.size, np.uint16),
        np.zeros((x.size, 2), np.float32),
    )
    run("conversions", x, bf, half, back, np.int32(x.size), block=64)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(BFLOAT16), x.astype(np.float16)
    for got, wanted, wide in zip(
        (bf.view(BFLOAT16), half.view(np.float16)), want, back.T, strict=True
    ):
        np.testing.assert_array_equal(got.astype(np.float64), wanted.astype(np.float64))
        np.testing.assert_array_equal(wide, wanted.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)], ids=str)
def test_packs_move_sixteen_bytes(dtype: np.dtype) -> None:
    x = np.arange(32 * 16 // dtype.itemsize).astype(dtype)
    y, pairs, unpacked = np.zeros_like(x), np.zeros(32, np.uint32), np.zeros((32, 2), np.float32)
    run("packs", x, y, pairs, unpacked, ELEMENT=str(dtype))
    np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))
    first = x.reshape(32, -1)[:, :2].astype(BFLOAT16)
    np.testing.assert_array_equal(pairs.view(BFLOAT16).reshape(32, 2), first)
    np.testing.assert_array_equal(unpacked, first.astype(np.float32))


def test_copies_fill_what_they_do_not_read_with_zeros() -> None:
    x, y = np.arange(1, 129, dtype=np.float32).reshape(32, 4), np.full((32, 4), np.nan, np.float32)
    run("copies", x, y, shared_bytes=512)
    kept = np.array([4, 2, 0])[np.arange(32) % 3]
    np.testing.assert_array_equal(y, np.where(np.arange(4) < kept[:, None], x, 0))


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
def test_mma_multiplies_fragments_from_ldmatrix(dtype: np.dtype) -> None:
    """Multiply distinct small integers, so that any element in a wrong place shows.

    They are exact in 16 bits, and so is their product in float32.
    """
    rng = np.random.default_rng(3)
    a, b = rng.permutation(256).reshape(16, 16) - 128, rng.permutation(128).reshape(16, 8) - 64
    d = np.zeros((2, 16, 8), np.float32)
    run(
        f"multiply_{dtype}",
        a.astype(dtype),
        b.T.copy().astype(dtype),
        b.astype(dtype),
        d,
        shared_bytes=1024,
    )
    np.testing.assert_array_equal(d, [a @ b, a @ b + 1])


def test_ldmatrix_gives_lane_l_two_elements_of_row_l_over_4() -> None:
    x, plain, transposed = (
        np.arange(256, dtype=np.uint16).reshape(4, 8, 8),
        *np.zeros((2, 4, 8, 8), np.uint16),
    )
    run("matrices", x, plain, transposed, shared_bytes=512)
    np.testing.assert_array_equal(plain, x)
    np.testing.assert_array_equal(transposed, x.transpose(0, 2, 1))


# ---- schedules

COUNTING = """
#include "include/cuda.cuh"
extern "C" __global__ void __launch_bounds__(64, (1)) order_of_arrival(unsigned* next, unsigned* arrived) {
    arrived[threadIdx.x] = atomicAdd(next, 1u);
    __syncthreads();
    WATCH(place, arrived[threadIdx.x]);
    float both[2][2] = {{1.0f, 2.0f}, {3.0f, (float)threadIdx.x}};
    WATCH(both, both);
}
"""  # noqa: E501 (the tests name its lines)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counting") / "counting.cu"
    include = Path(emulator.__file__).resolve().parent.parent / "gpu" / "include"
    path.write_text(COUNTING.replace("include/", f"{include}/"), encoding="utf-8")
    return path


def arrivals(path: Path, **options: Any) -> list[int]:
    arrived = np.zeros(64, np.uint32)
    launch(path, "order_of_arrival", {}, (1,), (64,), (np.zeros(1, np.uint32), arrived), **options)
    return arrived.tolist()


def test_orders_are_what_they_are_called(counting: Path) -> None:
    assert arrivals(counting) == list(range(64))
    assert arrivals(counting, order="greedy warp") == list(range(64))
    assert arrivals(counting, order="reversed") == list(range(64))[::-1]
    one, same, other = (arrivals(counting, order="random", seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(one) == list(range(64))


def test_preemption_leaves_results_alone(counting: Path) -> None:
    assert sorted(arrivals(counting, order="random", preempt=2)) == list(range(64))


def test_a_watched_thread_shows_its_values(counting: Path) -> None:
    record: list[emulator.Launched] = []
    arrivals(counting, watch=(0, 37), record=record)
    (launched,) = record
    assert [(w.name, w.value.tolist()) for w in launched.watched] == [
        ("place", 37),
        ("both", [[1, 2], [3, 37]]),
    ]
    assert [launched.symbols.frames([w.site])[w.site][0].line for w in launched.watched] == [6, 8]


def test_a_kernel_that_does_not_compile_says_so(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nonsense"):
        compile_text(tmp_path / "bad.cu", 'extern "C" __global__ void bad() { nonsense(); }', {})


def test_kernels_and_parameters_are_found_in_a_source() -> None:
    text = """// __global__ void no(int x) {}
    extern "C" __global__ void __launch_bounds__(ROWS * 32, (1))
    a(const __grid_constant__ Map map, float (&x)[2], int64_t n) {}
    __global__ __launch_bounds__(64) void b(/* none */) {}"""
    found = kernels_in(text)
    assert {name: [p.name for p in parameters] for name, parameters in found.items()} == {
        "a": ["map", "2", "n"],
        "b": [],
    }


# ---- what it shows


def test_costs_of_accesses_are_those_of_the_hardware() -> None:
    record: list[emulator.Launched] = []
    x = np.zeros(300, np.float32)[:256]
    launch(
        INSTRUCTIONS,
        "access_patterns",
        {},
        (1,),
        (32,),
        (x, floats(32)),
        log_block=0,
        record=record,
    )
    found = {i.frames[0].line: (i.cost, i.ideal) for i in heatmap.instructions(record[0])}
    wanted = {}
    for number, line in enumerate(INSTRUCTIONS.read_text(encoding="utf-8").splitlines(), 1):
        if pattern := re.search(r"// PATTERN (\d+) of (\d+)", line):
            wanted[number] = (float(pattern[1]), float(pattern[2]))
    assert len(wanted) == 12
    assert {line: cost for line, cost in found.items() if line in wanted} == wanted


def show(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(words)
    return status, "".join(capsys.readouterr())


def test_the_command_shows_what_a_thread_sees(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "v2.svg"
    words = "attention v2 --T 128 --block 1 --thread 37 --watch S,m,l --accesses 2 --heatmap"
    status, text = show(capsys, *words.split(), str(picture))
    assert status == 0
    assert re.search(r"relative error against float64: [12]\.\de-03", text)
    assert "block 1, thread 37 (warp 1, lane 5)" in text
    assert re.search(r"step 1, kernels/attention/v2_forward.cu:\d+: S \[2, 8, 4\]", text)
    assert re.search(r"  reads q\[\d+ \.\. \d+\] = ", text)
    assert re.search(r"read 16 B shared +\d+ +4.00 +4.00", text)
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


@pytest.mark.parametrize("op", sorted(EXAMPLES))
def test_the_command_knows_every_operation(capsys: pytest.CaptureFixture[str], op: str) -> None:
    status, text = show(capsys, op, "--T", "12", "--width", "40")
    assert status == 0
    assert re.search(r"(reads|writes) \w+\[\d+|step 1, ", text), text


def test_every_emulated_operation_has_an_example() -> None:
    emulated = {
        k.op for op in registry.ops() for k in registry.available(op) if k.backend == "emulator"
    }
    assert emulated == set(EXAMPLES)


def test_the_command_tries_an_edit(capsys: pytest.CaptureFixture[str]) -> None:
    barrier = "    __syncthreads();\n    if (here)"
    status, text = show(capsys, "xent_grad_", "--width", "2000", "--edit", barrier, "    if (here)")
    assert status == 1
    assert text.startswith("race in xent_grad")
    status, text = show(capsys, "xent_grad_", "--edit", "no such text", "")
    assert (status, text) == (1, "no kernel holds the text 'no such text'\n")


def test_the_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = show(capsys, "attention", "v9")
    assert status == 1
    assert "attention_forward v1" in text
    assert "attention v9" in text
