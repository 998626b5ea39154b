"""CUDA attention kernels under the emulator: schedules of threads and awkward arrays.

The tests also cover smaller GPUs and refused calls.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels import emulator
from minillm.kernels.attention import plans as tilings
from minillm.kernels.attention.device_table import device_table
from minillm.kernels.gpu import build

from minillm import kernels

pytestmark = pytest.mark.skipif(
    bool(emulator.compiler_missing()), reason=str(emulator.compiler_missing())
)

CAUSAL = kernels.Visibility()
DTYPES = {"v1": np.dtype(np.float32), "v2": np.dtype(ml_dtypes.bfloat16)}
FULL_GPU, AMPERE, SMALL_AMPERE, TURING = (
    kb << 10 for kb in (227, 163, 99, 64)
)  # shared memory that a block can have


def both_passes(
    variant: str, q: Any, k: Any, v: Any, grad_o: Any, **options: Any
) -> tuple[Any, ...]:
    """Return o, lse and the three gradients."""
    options = {"scale": 0.2, "visibility": CAUSAL} | options
    with kernels.use(attention=f"emulator:{variant}"):
        o, lse = kernels.attention_forward(q, k, v, **options)
        return (o, lse, *kernels.attention_backward(grad_o, q, k, v, o, lse, **options))


def inputs(dtype: np.dtype, B: int, T: int, H: int, Hkv: int, K: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    return tuple(rng.standard_normal((B, T, heads, K)).astype(dtype) for heads in (H, Hkv, Hkv, H))


def same_bits(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", DTYPES)
def test_no_schedule_of_threads_changes_a_bit(variant: str) -> None:
    arrays = inputs(DTYPES[variant], 1, 150, 2, 1, 32)
    dropout = kernels.AttentionDropout(0.3, 99, np.array([7]), 5, np.arange(150), np.arange(150))
    plain, dropped = both_passes(variant, *arrays), both_passes(variant, *arrays, dropout=dropout)
    for schedule in (
        {"order": "greedy warp"},
        {"order": "reversed"},
        {"order": "random", "seed": 1},
        {"preempt": 50},
    ):
        with emulator.emulate(**schedule):
            assert same_bits(both_passes(variant, *arrays), plain), schedule
            assert same_bits(both_passes(variant, *arrays, dropout=dropout), dropped), schedule


@pytest.mark.parametrize("variant", DTYPES)
def test_arrays_that_cannot_be_read_as_they_lie_are_copied(variant: str) -> None:
    arrays = inputs(DTYPES[variant], 1, 20, 2, 1, 32)
    shifted, mirrored = [], []
    for x in arrays:
        holder = np.full((1, 20, x.shape[2], 33), np.nan, x.dtype)
        holder[..., 1:] = x
        shifted.append(holder[..., 1:])
        mirrored.append(np.ascontiguousarray(x[..., ::-1])[..., ::-1])
    wanted = both_passes(variant, *arrays)
    assert same_bits(both_passes(variant, *shifted), wanted)
    assert same_bits(both_passes(variant, *mirrored), wanted)
    out = np.full((1, 20, 2, 33), np.nan, arrays[0].dtype)[..., 1:]
    with kernels.use(attention=f"emulator:{variant}"):
        o, _ = kernels.attention_forward(*arrays[:3], scale=0.2, visibility=CAUSAL, out=out)
    assert o is out and o.tobytes() == wanted[0].tobytes()


@pytest.mark.parametrize(
    ("variant", "shared_bytes"), [("v1", TURING), ("v2", AMPERE), ("v2", SMALL_AMPERE)]
)
@pytest.mark.parametrize("K", (64, 128))
def test_gpus_with_less_shared_memory(
    variant: str, shared_bytes: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = inputs(DTYPES[variant], 1, 70, 1, 1, K)
    wanted = both_passes(variant, *arrays)
    monkeypatch.setattr(tilings, "EMULATED_SHARED", shared_bytes)
    for x, y in zip(both_passes(variant, *arrays), wanted, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        assert np.linalg.norm(x - y) <= (1e-6 if variant == "v1" else 3e-3) * np.linalg.norm(y)


@pytest.mark.parametrize("shared_bytes", (FULL_GPU, AMPERE, SMALL_AMPERE, TURING))
def test_every_plan_fits_its_gpu_and_is_compiled_in_ci(shared_bytes: int) -> None:
    plans = [tilings.plan_v1("float32", K, shared_bytes) for K in tilings.HEAD_WIDTHS]
    if shared_bytes != TURING:
        plans += [
            tilings.plan_v2("bfloat16", K, dropout, shared_bytes)
            for K in tilings.HEAD_WIDTHS
            for dropout in (False, True)
        ]
    for tiles in (tiles for plan in plans for tiles in plan):
        assert tiles.shared_bytes <= shared_bytes
        defines = {macro: str(value) for macro, value in tiles.defines.items()}
        assert defines in build.build_sets(tiles.path), defines


def test_usual_masks_need_no_table() -> None:
    """Check that masks equal to a causal triangle, or to none, need no table."""
    q, k, _, _ = inputs(DTYPES["v2"], 2, 20, 1, 1, 32)
    by_sample = np.stack([np.arange(5, 25), np.arange(20)])
    usual = (
        (kernels.Visibility(True, by_sample, by_sample), True),
        (kernels.Visibility(True, np.arange(20, 40)), False),
        (kernels.Visibility(first_time=np.arange(20) - 20), True),
        (kernels.Visibility(False, key_lengths=np.array([20, 20])), False),
    )
    for seen, causal in usual:
        table = device_table(seen, q, k)
        assert table.table is None and table.order is None and table.causal == causal
    other = kernels.Visibility(True, np.arange(20) * 2)
    assert device_table(other, q, k).table is not None
    assert device_table(other, q, k) is device_table(other, q, k), "made once"


def test_what_no_kernel_takes_is_refused_with_the_way_out() -> None:
    narrow = inputs(DTYPES["v1"], 1, 4, 1, 1, 48)
    with pytest.raises(
        kernels.KernelUnavailable,
        match=r"head width 48, only for 32, 64, 96, 128.*use\(attention='numpy'\)",
    ):
        both_passes("v1", *narrow)
    with pytest.raises(kernels.KernelUnavailable, match=r"positive scale, not -1.*cuda:v1"):
        both_passes("v2", *inputs(DTYPES["v2"], 1, 4, 1, 1, 32), scale=-1.0)
    for variant in ("v2", "v3"):
        with pytest.raises(kernels.KernelUnavailable, match=r"no bound on scores.*cuda:v1"):
            both_passes(variant, *inputs(DTYPES["v2"], 1, 4, 1, 1, 32), cap=2.0)
    with pytest.raises(kernels.KernelUnavailable, match="cannot run as emulator:v2"):
        both_passes("v2", *inputs(DTYPES["v1"], 1, 4, 1, 1, 32))
