"""Hopper's instructions under the emulator: tile products in every layout of the kernels.

The integers are exact in 16 bits, so that any element in a wrong place shows. Other tests cover the
reports on what a kernel can do wrong with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels import emulator
from minillm.kernels.emulator import EmulatorError, launch, tensor_map

pytestmark = pytest.mark.skipif(
    emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
)

FILE = Path(__file__).resolve().parent / "cuda" / "hopper.cu"
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
SHARED_BYTES = 100_000


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-120, 121, shape).astype(np.float64)


def in_time(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a matrix [T, K] as one head of a strided array [B, T, H, K].

    The array holds NaN everywhere else.
    """
    holder = np.full((2, x.shape[0], 3, x.shape[1]), np.nan, dtype)
    holder[1:, :, 1:2] = x[None, :, None]
    return holder[1:, :, 1:2]


def tile_map(x: np.ndarray, rows: int) -> Any:
    return tensor_map(x, (1, rows, 1, 64))


def run(kernel: str, args: tuple[Any, ...], **defines: str | int) -> None:
    for order in emulator.ORDERS:
        launch(FILE, kernel, defines, (1,), (128,), args, SHARED_BYTES, order=order)


@DTYPES
@pytest.mark.parametrize(
    ("N", "columns", "rows"), [(128, 64, 128), (64, 128, 64), (96, 96, 50), (32, 32, 7)]
)
def test_a_product_of_two_tiles(N: int, columns: int, rows: int, dtype: np.dtype) -> None:
    """Multiply tiles of which `rows` rows exist.

    The rest of the tiles is zero, and is not copied back.
    """
    a, b = integers(min(rows, 64), columns), integers(rows, columns)
    copy = in_time(np.full_like(a, np.nan), dtype)
    d = np.full((64, N), np.nan, np.float32)
    args = (tile_map(in_time(a, dtype), 64), tile_map(in_time(b, dtype), N), tile_map(copy, 64), d)
    run("product_transposed", args, TEST_WIDTH=N, TEST_DEPTH=columns, ELEMENT=str(dtype))
    want = np.zeros((64, N))
    want[: len(a), : len(b)] = a @ b.T
    np.testing.assert_array_equal(d, want)
    np.testing.assert_array_equal(copy[0, :, 0].astype(np.float64), a)
    assert (
        np.isnan(copy.base.astype(np.float32)[:, :, 0]).all()
        and np.isnan(copy.base.astype(np.float32)[0]).all()
    )


@DTYPES
@pytest.mark.parametrize(("N", "depth"), [(128, 64), (64, 128), (96, 128), (32, 64)])
def test_a_product_of_registers_and_a_tile(N: int, depth: int, dtype: np.dtype) -> None:
    a, b = integers(64, depth), integers(depth, N)
    copy, d = in_time(np.full((64, N), np.nan), dtype), np.full((64, N), np.nan, np.float32)
    args = (a.astype(np.float32), tile_map(in_time(b, dtype), depth), tile_map(copy, 64), d)
    run("product", args, TEST_WIDTH=N, TEST_DEPTH=depth, ELEMENT=str(dtype))
    np.testing.assert_array_equal(d, a @ b + 1)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(copy[0, :, 0], (2 * d).astype(dtype))


@pytest.mark.parametrize(("swizzle", "first"), [(32, 0), (64, 0), (64, 16), (128, 0), (128, 48)])
def test_every_swizzle(swizzle: int, first: int) -> None:
    width = swizzle // 2
    a, b, c = integers(64, width), integers(64, width), integers(16, 64)
    maps = [
        tensor_map(x.astype(BFLOAT16), (rows, width), swizzle)
        for x, rows in ((a, 64), (b, 64), (c, 16))
    ]
    d = np.full((2, 64, 64), np.nan, np.float32)
    run("swizzles", (*maps, d, np.int32(first)), TEST_WIDTH=64, SWIZZLE_BYTES=swizzle)
    left = a[:, first : first + 16]
    np.testing.assert_array_equal(d, [left @ b[:, first : first + 16].T, left @ c])


# What a kernel may not do, as an edit of product_transposed: what stands there, what is to stand
# there, and what is reported.
_WAIT, _EXPECT = (
    "    mbarrier_wait(&shared.full, 0);\n    float sums[TEST_WIDTH / 2];\n",
    "sizeof(shared.a) + sizeof(shared.b));\n        load",
)
_START = "    start_product_transposed<TEST_WIDTH, TEST_DEPTH>(sums, shared.a, shared.b);\n"
FAULTS = {
    "a tile is used before it arrives": (
        _WAIT,
        "    float sums[TEST_WIDTH / 2];\n",
        "no thread has waited for it",
    ),
    "fewer bytes are expected than come": (
        _EXPECT,
        _EXPECT.replace("sizeof(shared.a) +", ""),
        "arrived|still under way|did not come|race",
    ),
    "more bytes are expected than come": (
        _EXPECT,
        _EXPECT.replace("sizeof(shared.a) +", "2 * sizeof(shared.a) +"),
        "lacks 0 arrivals and 8192",
    ),
    "the wrong phase is waited for": (
        _WAIT,
        _WAIT.replace("full, 0", "full, 1"),
        "no thread has waited for it",
    ),
    "the copy engine does not know the barrier": (
        "        fence_barrier_init();\n",
        "",
        "no fence_barrier_init",
    ),
    "product without a wait": (
        "    wait_for<0>(sums);\n    write_accumulators(d, sums);\n    if",
        "    if",
        "still under way",
    ),
    "accumulators are written under way": (
        _START,
        f"{_START}    sums[3] = 5;\n",
        "accumulator 3 was written between",
    ),
    "the tile is written under way": (
        _START,
        f"{_START}    shared.a[threadIdx.x] = shared.b[0];\n",
        "race",
    ),
    "a product without its fence": (
        _START,
        "    wgmma_m64_k16<Element, TEST_WIDTH, 0>(sums, 0, 0, false);\n",
        "no warpgroup_fence",
    ),
    "copy without a wait": (
        "        tma_commit();\n        tma_wait<0>();\n    }\n}\n\n// d [64, TEST_WIDTH] = 1",
        "    }\n}\n\n// d [64, TEST_WIDTH] = 1",
        "still under way|$",
    ),
    "a tile stored without a fence": (
        "        store_tile<64, TEST_DEPTH>",
        "        shared.a[0] = shared.b[0];\n        store_tile<64, TEST_DEPTH>",
        "fence_async_proxy",
    ),
    "a barrier that is none": (
        "    mbarrier_wait(&shared.full, 0);\n    float sums",
        "    mbarrier_wait(&shared.full + 1, 0);\n    float sums",
        "never initialised",
    ),
    "a tile off its boundary": (
        "load_tile<64, TEST_DEPTH>(shared.a, ",
        "load_tile<64, TEST_DEPTH>(shared.a + 8, ",
        "misaligned",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(fault: str) -> None:
    old, new, says = FAULTS[fault]
    assert FILE.read_text(encoding="utf-8").count(old) == 1
    a, b, copy = (in_time(integers(rows, 64), BFLOAT16) for rows in (64, 128, 64))
    args = (tile_map(a, 64), tile_map(b, 128), tile_map(copy, 64), np.zeros((64, 128), np.float32))
    with emulator.emulate(edits=((old, new),)), pytest.raises(EmulatorError, match=says):
        launch(
            FILE,
            "product_transposed",
            {"TEST_WIDTH": 128, "TEST_DEPTH": 64},
            (1,),
            (128,),
            args,
            SHARED_BYTES,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x[..., 1:], (1, 8, 1, 64)), "address is a multiple"),
        (lambda x: (x[:, :, :, ::2], (1, 8, 1, 32)), "last dim is contiguous"),
        (lambda x: (x[..., :0], (1, 8, 1, 64)), "no empty dim"),
        (lambda x: (x, (1, 300, 1, 64)), "1 to 256"),
        (lambda x: (x, (1, 8, 1, 128)), "no longer than the swizzle"),
        (lambda x: (x, (8, 1, 64)), "a size for each dim"),
        (
            lambda x: (np.zeros((1, 4, 1, 65), BFLOAT16)[..., :64], (1, 4, 1, 64)),
            "strides are multiples",
        ),
        (lambda x: (x.astype(np.float64), (1, 8, 1, 16)), "float16, bfloat16 or float32"),
    ],
)
def test_what_the_copy_engine_cannot_cut_is_refused(change: Any, message: str) -> None:
    array, box = change(np.zeros((2, 8, 1, 128), BFLOAT16))
    with pytest.raises(ValueError, match=message):
        tensor_map(array, box)
