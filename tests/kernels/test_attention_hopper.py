"""Attention v3 under the emulator beyond the cases of the kernel test: rings that come round, many
parts a block, schedules of threads, and what it leaves to other variants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kernel_references as plain
import ml_dtypes
import numpy as np
import pytest
from kernel_check import check_narrow
from minillm.kernels import emulator
from minillm.kernels.attention import cuda as bindings
from minillm.kernels.attention import hopper

from minillm import kernels

pytestmark = pytest.mark.skipif(
    emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE = 0.2


def exact_inputs(B: int, T: int, H: int, Hkv: int, K: int) -> tuple[Any, ...]:
    """q, k, v and grad_o in float64."""
    rng = np.random.default_rng(T)
    return tuple(rng.standard_normal((B, T, heads, K)) for heads in (H, Hkv, Hkv, H))


def padding(T: int) -> Any:
    """A mask [3, T] of keys: with holes and a whole tile hidden; the first tiles hidden, all that
    the first queries may see; all hidden."""
    mask = np.random.default_rng(T).random((3, T)) < 0.7
    mask[0, 128:256] = mask[1, :300] = mask[2] = False
    return mask


def both_passes(arrays: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """o, lse and the three gradients."""
    q, k, v, grad_o = arrays
    options = {"scale": SCALE, "causal": True} | options
    with kernels.use(attention="emulator:v3"):
        o, lse = kernels.attention_forward(q, k, v, **options)
        return (o, lse, *kernels.attention_backward(grad_o, q, k, v, o, lse, **options))


def expected(
    q: Any, k: Any, v: Any, grad_o: Any, key_mask: Any = None, causal: bool = True
) -> tuple[Any, ...]:
    seen = np.tri(q.shape[1], dtype=bool) if causal else np.True_
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    return (
        *plain.attention(q, k, v, SCALE, seen),
        *plain.attention_grads(grad_o, q, k, v, SCALE, seen),
    )


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
def test_a_padding_mask(T: int, K: int, causal: bool) -> None:
    exact, mask = exact_inputs(3, T, 1, 1, K), padding(T)
    arrays = rounded(exact)
    wide = tuple(x.astype(np.float64) for x in arrays)
    got = both_passes(arrays, causal=causal, key_mask=mask)
    check_narrow(got, expected(*exact, mask, causal), expected(*wide, mask, causal), "bfloat16")
    for grad in got[3:]:
        assert not grad[~mask].any(), "a hidden key has a gradient"


def test_tiles_that_a_mask_hides_are_not_loaded() -> None:
    """What lies there may be anything."""
    q, k, v, grad_o = rounded(exact_inputs(3, 450, 1, 1, 32))
    mask = padding(450)
    wanted = both_passes((q, k, v, grad_o), key_mask=mask)
    k[0, 128:256] = v[1, :256] = np.nan
    k[2] = v[2] = np.inf
    assert same_bits(both_passes((q, k, v, grad_o), key_mask=mask), wanted)


def test_a_mask_that_hides_nothing_changes_no_bit() -> None:
    arrays = rounded(exact_inputs(1, 300, 2, 1, 64))
    assert same_bits(both_passes(arrays, key_mask=np.ones((1, 300), bool)), both_passes(arrays))


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
    mask = padding(300)[1:2]
    wanted, masked = both_passes(arrays), both_passes(arrays, key_mask=mask)
    for schedule in (
        {"order": "greedy warp"},
        {"order": "reversed"},
        {"order": "random", "seed": 1},
        {"preempt": 50},
    ):
        with emulator.emulate(**schedule):
            assert same_bits(both_passes(arrays), wanted), schedule
            assert same_bits(both_passes(arrays, key_mask=mask), masked), schedule


def test_turns_change_no_bit() -> None:
    arrays = rounded(exact_inputs(1, 300, 1, 1, 64))
    wanted = both_passes(arrays)
    q, k, v, _ = arrays
    edit = ("#define TAKE_TURNS 1", "#define TAKE_TURNS 0")
    with emulator.emulate(edits=(edit,), order="random"), kernels.use(attention="emulator:v3"):
        assert same_bits(kernels.attention_forward(q, k, v, scale=SCALE, causal=True), wanted[:2])


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
            grad_o, *parts, wanted[0], wanted[1], scale=SCALE, causal=True, **outs
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
        o, _ = kernels.attention_forward(q, shared_keys, v, scale=SCALE, causal=True, out=odd)
    assert o is odd and o.tobytes() == wanted[0].tobytes()


DROPOUT = kernels.AttentionDropout(0.3, 99, np.array([7]), 5, np.arange(20), np.arange(20))
REFUSED = [
    ({"dropout": DROPOUT}, "dropout"),
    ({"times_q": np.arange(20) * 2, "times_k": np.arange(20)}, "times other than the indices"),
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
    plain_options = {"scale": SCALE, "causal": True}
    assert bindings.fastest(q, q, plain_options) == best
    for options, _ in REFUSED:
        other = bindings.fastest(q, q, plain_options | options)
        assert other == ("v1" if best == "v1" or "scale" in options else "v2")
