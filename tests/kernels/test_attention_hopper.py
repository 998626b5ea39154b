"""Attention v3 under the emulator, beyond the cases of the kernel test.

The tests cover rings that come round, many parts a block, schedules of threads, and calls left to
other variants.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_check import check_narrow
from minillm.kernels import emulator
from minillm.kernels.attention import cuda as bindings
from minillm.kernels.attention import hopper, reference

from minillm import kernels

pytestmark = pytest.mark.skipif(
    emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE = 0.2
CAUSAL = kernels.Visibility()


def exact_inputs(B: int, T: int, H: int, Hkv: int, K: int) -> tuple[Any, ...]:
    """Return q, k, v and grad_o in float64."""
    rng = np.random.default_rng(T)
    return tuple(rng.standard_normal((B, T, heads, K)) for heads in (H, Hkv, Hkv, H))


def padding(T: int, causal: bool = True) -> kernels.Visibility:
    """Return limits for three samples.

    One has its last keys hidden, one its first tiles and its last queries' keys, one all keys.
    """
    first = np.zeros((3, T), np.int32)
    first[1] = 130  # a document that begins inside the second tile: earlier queries see nothing
    lengths = np.array([T - 150, T - 20, 0], np.int32)
    return kernels.Visibility(causal=causal, key_lengths=lengths, first_time=first)


def both_passes(arrays: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """Return o, lse and the three gradients."""
    q, k, v, grad_o = arrays
    options = {"scale": SCALE, "visibility": CAUSAL} | options
    with kernels.use(attention="emulator:v3"):
        o, lse = kernels.attention_forward(q, k, v, **options)
        return (o, lse, *kernels.attention_backward(grad_o, q, k, v, o, lse, **options))


def expected(
    q: Any, k: Any, v: Any, grad_o: Any, visibility: kernels.Visibility | None = None
) -> tuple[Any, ...]:
    options = {"scale": SCALE, "visibility": visibility or CAUSAL}
    o, lse = reference.attention_forward(q, k, v, **options)
    return (o, lse, *reference.attention_backward(grad_o, q, k, v, o, lse, **options))


def rounded(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.astype(BFLOAT16) for x in arrays)


def same_bits(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("T", "K"), [(700, 64), (400, 128)])
def test_rings_that_come_round(T: int, K: int) -> None:
    exact = exact_inputs(1, T, 2, 1, K)
    arrays = rounded(exact)
    check_narrow(
        both_passes(arrays),
        expected(*exact),
        expected(*(x.astype(np.float64) for x in arrays)),
        "bfloat16",
    )


@pytest.mark.parametrize(
    ("T", "K", "causal"), [(450, 32, True), (450, 32, False), (300, 128, True)]
)
def test_key_lengths_and_documents(T: int, K: int, causal: bool) -> None:
    exact, seen = exact_inputs(3, T, 1, 1, K), padding(T, causal)
    arrays = rounded(exact)
    wide = tuple(x.astype(np.float64) for x in arrays)
    got = both_passes(arrays, visibility=seen)
    check_narrow(got, expected(*exact, seen), expected(*wide, seen), "bfloat16")
    for grad in got[3:]:
        assert not grad[0, T - 150 :].any() and not grad[1, :130].any() and not grad[2].any()


def test_tiles_that_no_query_sees_are_not_loaded() -> None:
    """Check that NaN and infinity in such tiles change no bit."""
    q, k, v, grad_o = rounded(exact_inputs(3, 450, 1, 1, 32))
    seen = padding(450)
    wanted = both_passes((q, k, v, grad_o), visibility=seen)
    k[0, 384:] = v[0, 384:] = k[1, :128] = v[1, :128] = np.nan
    k[2] = v[2] = np.inf
    assert same_bits(both_passes((q, k, v, grad_o), visibility=seen), wanted)


def test_limits_that_hide_nothing_change_no_bit() -> None:
    arrays = rounded(exact_inputs(1, 300, 2, 1, 64))
    idle = kernels.Visibility(
        key_lengths=np.array([300], np.int32), first_time=np.zeros((1, 300), np.int32)
    )
    assert same_bits(both_passes(arrays, visibility=idle), both_passes(arrays))


@pytest.mark.parametrize("blocks", [1, 3, 100])
@pytest.mark.parametrize("cache_bytes", [1, 1 << 30])
def test_the_order_of_the_work_changes_no_bit(
    blocks: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = rounded(exact_inputs(2, 300, 4, 2, 32))
    wanted = both_passes(arrays)
    monkeypatch.setattr(hopper, "multiprocessors", lambda like: blocks)
    monkeypatch.setattr(hopper, "_CACHE_BYTES", cache_bytes)
    assert same_bits(both_passes(arrays), wanted)


def test_no_schedule_of_threads_changes_a_bit() -> None:
    arrays = rounded(exact_inputs(1, 300, 2, 1, 64))
    whole = padding(300)
    seen = kernels.Visibility(key_lengths=whole.key_lengths[1:2], first_time=whole.first_time[1:2])
    wanted, masked = both_passes(arrays), both_passes(arrays, visibility=seen)
    for schedule in (
        {"order": "greedy warp"},
        {"order": "reversed"},
        {"order": "random", "seed": 1},
        {"preempt": 50},
    ):
        with emulator.emulate(**schedule):
            assert same_bits(both_passes(arrays), wanted), schedule
            assert same_bits(both_passes(arrays, visibility=seen), masked), schedule


def test_turns_change_no_bit() -> None:
    arrays = rounded(exact_inputs(1, 300, 1, 1, 64))
    wanted = both_passes(arrays)
    q, k, v, _ = arrays
    edit = ("#define TAKE_TURNS 1", "#define TAKE_TURNS 0")
    with emulator.emulate(edits=(edit,), order="random"), kernels.use(attention="emulator:v3"):
        assert same_bits(
            kernels.attention_forward(q, k, v, scale=SCALE, visibility=CAUSAL), wanted[:2]
        )


def test_a_fused_projection_is_read_as_it_lies() -> None:
    q, k, v, grad_o = rounded(exact_inputs(2, 70, 2, 2, 32))
    fused = np.stack([q, k, v], axis=2)  # [B, T, 3, H, K]
    parts = tuple(fused[:, :, i] for i in range(3))
    assert all(hopper.can_be_tiled(x) and hopper.tiled(x) is x for x in parts)
    grads = np.full_like(fused, np.nan)
    wanted = both_passes((q, k, v, grad_o))
    got = both_passes((*parts, grad_o))
    assert same_bits(got, wanted)
    with kernels.use(attention="emulator:v3"):
        outs = dict(
            zip(("grad_q", "grad_k", "grad_v"), (grads[:, :, i] for i in range(3)), strict=True)
        )
        kernels.attention_backward(
            grad_o, *parts, wanted[0], wanted[1], scale=SCALE, visibility=CAUSAL, **outs
        )
    assert same_bits(tuple(np.ascontiguousarray(grads[:, :, i]) for i in range(3)), wanted[2:])


def test_arrays_that_cannot_be_tiled_are_copied() -> None:
    q, k, v, grad_o = rounded(exact_inputs(1, 70, 2, 2, 32))
    shared_keys = np.broadcast_to(k[:, :, :1], k.shape)  # a stride of 0
    odd = np.full((1, 70, 2, 33), np.nan, BFLOAT16)[..., 1:]
    assert not any(map(hopper.can_be_tiled, (shared_keys, odd, q[:, ::-1], q[0][None])))
    wanted = both_passes((q, shared_keys.copy(), v, grad_o))
    assert same_bits(both_passes((q, shared_keys, v, grad_o)), wanted)
    with kernels.use(attention="emulator:v3"):
        o, _ = kernels.attention_forward(q, shared_keys, v, scale=SCALE, visibility=CAUSAL, out=odd)
    assert o is odd and o.tobytes() == wanted[0].tobytes()


DROPOUT = kernels.AttentionDropout(0.3, 99, np.array([7]), 5, np.arange(20), np.arange(20))
REFUSED = [
    ({"dropout": DROPOUT}, "dropout"),
    ({"scale": -1.0}, "a scale of -1"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_v3_leaves_to_others_is_refused(options: dict[str, Any], reason: str) -> None:
    arrays = rounded(exact_inputs(1, 20, 1, 1, 32))
    with pytest.raises(
        kernels.KernelUnavailable, match=rf"v3 does not take {reason}.*use\(attention='cuda:v2'\)"
    ):
        both_passes(arrays, **options)
    with pytest.raises(
        kernels.KernelUnavailable, match="head width 48, not one of 32, 64, 96, 128"
    ):
        both_passes(rounded(exact_inputs(1, 20, 1, 1, 48)))


@pytest.mark.parametrize(
    ("capability", "best"), [("90", "v3"), ("80", "v2"), ("100", "v2"), ("75", "v1")]
)
def test_auto_takes_v3_where_it_can_run(
    capability: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "compute_capability", lambda device: capability)
    monkeypatch.setattr(hopper, "compute_capability", lambda device: capability)
    q = SimpleNamespace(dtype=BFLOAT16, shape=(1, 20, 1, 32), device=SimpleNamespace(id=0))
    monkeypatch.setattr(bindings, "namespace", lambda x: np)
    plain_options = {"scale": SCALE, "visibility": CAUSAL}
    assert bindings.fastest(q, plain_options) == best
    for options, _ in REFUSED:
        other = bindings.fastest(q, plain_options | options)
        assert other == ("v1" if best == "v1" or "scale" in options else "v2")
