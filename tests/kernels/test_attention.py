"""Masks of attention: the plain reference by hand, and what holds of packed and padded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from minillm.kernels import Visibility
from minillm.kernels.attention import reference

from minillm import kernels

CHOICES = [
    k.choice
    for k in kernels.available("attention_forward")
    if k.backend in ("numpy", "c") and k.unavailable is None
]
DOCUMENTS = np.repeat([0, 37, 128], [37, 91, 72])  # start of each query's document

# Visibility, and the keys that each of 3 queries of 2 samples sees among 4.
BY_HAND: list[tuple[Visibility, list[list[str]]]] = [
    (Visibility(), [["x...", "xx..", "xxx."]] * 2),
    (Visibility(False), [["xxxx"] * 3] * 2),
    (Visibility(True, np.array([2, 0, 9])), [["xxx.", "x...", "xxxx"]] * 2),
    (Visibility(True, None, np.array([1, 0, 3, 2])), [[".x..", "xx..", "xx.x"]] * 2),
    (
        Visibility(True, np.array([[0, 1, 2], [1, 2, 3]])),
        [["x...", "xx..", "xxx."], ["xx..", "xxx.", "xxxx"]],
    ),
    (Visibility(False, key_lengths=np.array([3, 0])), [["xxx."] * 3, ["...."] * 3]),
    (Visibility(True, key_lengths=np.array([1, 9])), [["x..."] * 3, ["x...", "xx..", "xxx."]]),
    (Visibility(first_time=np.array([0, 1, 1])), [["x...", ".x..", ".xx."]] * 2),
    (Visibility(first_time=np.arange(3) - 1), [["x...", "xx..", ".xx."]] * 2),
    (
        Visibility(False, first_time=np.array([[0, 2, 4], [3, 1, -1]])),
        [["xxxx", "..xx", "...."], ["...x", ".xxx", "xxxx"]],
    ),
    (
        Visibility(
            True,
            np.array([[3, 4, 5], [0, 2, 4]]),
            np.array([[3, 1, 2, 4], [0, 0, 2, 1]]),
            np.array([4, 3]),
            np.array([[2, 2, 5], [0, 1, 0]]),
        ),
        [["x.x.", "x.xx", "...."], ["xx..", "..x.", "xxx."]],
    ),
]


def mask_of(rows: list[list[str]]) -> Any:
    return np.array([[[key == "x" for key in query] for query in sample] for sample in rows])


def normals(B: int, T: int, heads: tuple[int, ...], K: int = 8) -> list[Any]:
    rng = np.random.default_rng(T)
    return [rng.standard_normal((B, T, h, K)).astype(np.float32) for h in heads]


def both_passes(
    choice: str, q: Any, k: Any, v: Any, grad_o: Any, seen: Visibility, dropout: Any = None
) -> tuple[Any, ...]:
    """Return o, lse and the three gradients."""
    options: dict[str, Any] = dict(scale=0.5, visibility=seen, dropout=dropout)
    with kernels.use(attention=choice):
        o, lse = kernels.attention_forward(q, k, v, **options)
        return o, lse, *kernels.attention_backward(grad_o, q, k, v, o, lse, **options)


def same_bits(a: Any, b: Any) -> bool:
    return bool(a.tobytes() == b.tobytes())


def formula_scores(q: Any, k: Any, scale: float, seen: Any) -> Any:
    """Return scores [B, H, Tq, Tk], minus infinity where not `seen`.

    `seen` broadcasts to the same shape.
    """
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.where(seen, np.einsum("bihd,bjhd->bhij", q, k) * scale, -np.inf)


def formula(q: Any, k: Any, v: Any, scale: float, seen: Any) -> tuple[Any, ...]:
    """Compute attention over whole matrices: o [B, Tq, H, K], lse [B, H, Tq]."""
    p, lse = _probabilities(formula_scores(q, k, scale, seen))
    return np.einsum("bhij,bjhd->bihd", p, np.repeat(v, q.shape[2] // v.shape[2], axis=2)), lse


def formula_grads(grad_o: Any, q: Any, k: Any, v: Any, scale: float, seen: Any) -> tuple[Any, ...]:
    group = q.shape[2] // k.shape[2]
    p, _ = _probabilities(formula_scores(q, k, scale, seen))
    grad_p = np.einsum("bihd,bjhd->bhij", grad_o, np.repeat(v, group, axis=2))
    grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdims=True))
    grad_q = np.einsum("bhij,bjhd->bihd", grad_s, np.repeat(k, group, axis=2)) * scale
    grad_k = np.einsum("bhij,bihd->bjhd", grad_s, q) * scale
    grad_v = np.einsum("bhij,bihd->bjhd", p, grad_o)
    B, Tk, Hkv, K = k.shape
    return (
        grad_q,
        grad_k.reshape(B, Tk, Hkv, group, K).sum(3),
        grad_v.reshape(B, Tk, Hkv, group, K).sum(3),
    )


def _probabilities(scores: Any) -> tuple[Any, Any]:
    """Return the softmax over keys and its log-sum-exp.

    Rows that see no key have 0 and minus infinity.
    """
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return e / np.where(total == 0, 1, total), (np.log(total) + top)[..., 0]


@pytest.mark.parametrize(("seen", "rows"), BY_HAND)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_query_sees_what_its_visibility_says(
    choice: str, seen: Visibility, rows: list[list[str]]
) -> None:
    """Check that equal scores give each visible key the same probability.

    Unit values make the output the probabilities.
    """
    q, k = np.zeros((2, 3, 1, 4), np.float32), np.zeros((2, 4, 1, 4), np.float32)
    v = np.tile(np.eye(4, dtype=np.float32)[None, :, None], (2, 1, 1, 1))
    o, lse, *_ = both_passes(choice, q, k, v, q, seen)
    mask = mask_of(rows)
    counts = mask.sum(-1, keepdims=True)
    np.testing.assert_allclose(o[:, :, 0], mask / np.maximum(counts, 1), rtol=1e-6)
    assert np.array_equal(lse[:, 0] == -np.inf, counts[..., 0] == 0)


@pytest.mark.parametrize(("seen", "rows"), BY_HAND)
def test_the_reference_is_a_softmax_over_what_is_seen(
    seen: Visibility, rows: list[list[str]]
) -> None:
    rng = np.random.default_rng(0)
    q, grad_o = rng.standard_normal((2, 2, 3, 4, 5))
    k, v = rng.standard_normal((2, 2, 4, 2, 5))
    mask = mask_of(rows)[:, None]
    o, lse = reference.attention_forward(q, k, v, scale=0.7, visibility=seen)
    grads = reference.attention_backward(grad_o, q, k, v, o, lse, scale=0.7, visibility=seen)
    want = formula(q, k, v, 0.7, mask)
    want_grads = formula_grads(grad_o, q, k, v, 0.7, mask)
    for x, y in zip((o, lse, *grads), (*want, *want_grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-13)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("factor", [0.5, 1000])
def test_a_document_changes_no_bit_of_another(choice: str, factor: int) -> None:
    arrays = normals(1, 200, (2, 1, 1, 2))
    changed = [x.copy() for x in arrays]
    for x in changed:
        x[:, :37] *= factor
    seen = Visibility(first_time=DOCUMENTS)
    for a, b in zip(*(both_passes(choice, *x, seen) for x in (arrays, changed)), strict=True):
        others = (slice(None), slice(37, None)) if a.ndim == 4 else (..., slice(37, None))
        assert same_bits(a[others], b[others]) and not same_bits(a, b)


@pytest.mark.parametrize("choice", CHOICES)
def test_tiles_that_no_query_sees_are_left_out(choice: str) -> None:
    """Check that invalid keys and values in such tiles reach no result."""
    q, k, v, grad_o = normals(1, 512, (2, 1, 1, 2))
    seen = Visibility(first_time=np.arange(512) // 256 * 256)
    before = both_passes(choice, q, k, v, grad_o, seen)
    k[:, :256] = v[:, :256] = np.nan
    after = both_passes(choice, q, k, v, grad_o, seen)
    for a, b in zip(before, after, strict=True):
        last = (slice(None), slice(256, None)) if a.ndim == 4 else (..., slice(256, None))
        assert same_bits(a[last], b[last])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_row_equals_the_row_alone(choice: str, causal: bool) -> None:
    arrays, lengths = normals(3, 150, (4, 2, 2, 4)), np.array([150, 67, 1])
    for b, length in enumerate(lengths):
        arrays[3][b, length:] = 0  # padding queries have no loss
    padded = both_passes(choice, *arrays, Visibility(causal, key_lengths=lengths))
    for b, n in enumerate(lengths):
        alone = both_passes(choice, *(x[b : b + 1, :n] for x in arrays), Visibility(causal))
        for a, x in zip(alone, padded, strict=True):
            part = x[b : b + 1, :n] if a.ndim == 4 else x[b : b + 1, :, :n]
            np.testing.assert_allclose(a, part, atol=3e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_window_of_all_keys_equals_none(choice: str) -> None:
    """Compare bits, since the order of every sum is the same."""
    arrays = normals(2, 150, (2, 2, 2, 2))
    wide = Visibility(first_time=np.arange(150) - 149)
    for a, b in zip(
        both_passes(choice, *arrays, wide), both_passes(choice, *arrays, Visibility()), strict=True
    ):
        assert same_bits(a, b)


@pytest.mark.parametrize("choice", CHOICES)
def test_times_of_a_sample_are_its_own(choice: str) -> None:
    """Check that a sample gets the mask and the dropout that it gets alone."""
    arrays = normals(3, 90, (2, 2, 2, 2))
    rng = np.random.default_rng(1)
    times = np.stack([rng.permutation(90) for _ in range(3)])
    first = times - np.array([[90], [20], [5]])
    dropout = kernels.AttentionDropout(0.4, 3, np.array([8, 2, 5]), 1, times, times)
    together = both_passes(choice, *arrays, Visibility(True, times, times, None, first), dropout)
    for b in range(3):
        own = dropout._replace(samples=dropout.samples[[b]], times_q=times[b], times_k=times[b])
        seen = Visibility(True, times[b], times[b], first_time=first[b])
        alone = both_passes(choice, *(x[[b]] for x in arrays), seen, own)
        for a, x in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], x[b], atol=3e-6)


def test_arrays_of_wrong_shape_are_refused() -> None:
    arrays = normals(2, 5, (1, 1, 1, 1))
    for seen, message in (
        (
            Visibility(key_lengths=np.array([5])),
            r"key_lengths has shape \(1,\), not \[B\] = \(2,\)",
        ),
        (Visibility(first_time=np.zeros((3, 5))), r"first_time has shape \(3, 5\), not \(5,\) or"),
        (Visibility(True, np.arange(4)), r"times_q has shape \(4,\), not \(5,\) or \(2, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            both_passes("numpy", *arrays, seen)


def test_masks_of_several_heads_are_those_of_each() -> None:
    times_q, times_k = np.array([[3, 9, 4], [0, 2, 50]]), np.arange(7)
    dropout = kernels.AttentionDropout(0.4, 3, np.array([8, 2]), 5, times_q, times_k)
    for keys in (slice(1, 6), np.array([6, 0, 3])):
        for b in range(2):
            found = dropout.masks(b, slice(1, 4), slice(0, 2), keys, np.dtype(np.float64))
            for i, h in enumerate(range(1, 4)):
                expected = dropout.mask(b, h, slice(0, 2), keys, np.dtype(np.float64))
                assert np.array_equal(found[i], expected)
            assert len({mask.tobytes() for mask in found}) == 3
