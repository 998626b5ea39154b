"""Attention on the GPU, in three variants.

v1 has float32 tiles, for any GPU and dtype. v2 uses tensor cores, for 16-bit dtypes from compute
capability 8.0 on. v3 uses Hopper's instructions, for 16-bit dtypes on compute capability 9.0, and
is launched in hopper.py.

Variant `auto`, the default, selects the fastest one for the given arrays. All variants exchange the
log-sum-exp as float32, so one may do the forward pass and another the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, empty, namespace
from minillm.kernels.attention import hopper
from minillm.kernels.attention.device_table import DeviceTable, device_table
from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.attention.plans import Tiles, plan_of, refuse_cap
from minillm.kernels.attention.visibility import Visibility
from minillm.kernels.dropout.cuda import mask_words
from minillm.kernels.gpu.launching import address, compute_capability, element, launch, same_dtype
from minillm.kernels.gpu.registering import DTYPES, cuda_kernel, unavailable
from minillm.kernels.random.hashing import threshold
from minillm.kernels.registry import KernelUnavailable, kernel

HALF_DTYPES = ("bfloat16", "float16")

# Their C twins: Strides and Attention in common.cuh.
_STRIDES = np.dtype([("batch", np.int64), ("time", np.int64), ("head", np.int64)])
_STRIDED = ("q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v")
_SIZES = ("num_queries", "num_keys", "num_heads", "num_kv_heads", "causal")
_STEPS = ("visible_step", "column_step")
_ATTENTION = np.dtype(
    [
        *((name, _STRIDES) for name in _STRIDED),
        *((name, np.int32) for name in (*_SIZES, *_STEPS)),
        ("threshold", np.uint32),
        ("scale", np.float32),
        ("keep_scale", np.float32),
        ("cap", np.float32),
        ("per_cap", np.float32),
    ]
)


# ---- arguments


def _words(dropout: AttentionDropout | None, seen: DeviceTable, q: Any) -> tuple[Any, Any, Any]:
    """Return the addresses of dropout.

    They are a word for each sample and head uint64 [B H], query times int64 [B, Tq], and a word for
    each key uint32 [S, Tk].
    """
    if dropout is None:
        return None, None, None
    xp, (B, Tq, H) = namespace(q), q.shape[:3]
    heads = xp.arange(dropout.head0, dropout.head0 + H)
    times_k = xp.asarray(dropout.times_k)
    times_k = times_k.reshape(-1, times_k.shape[-1])
    words, columns = mask_words(q, dropout.key, dropout.samples, heads, times_k.reshape(-1))
    columns = columns.reshape(times_k.shape)
    if seen.order is not None:
        S = max(len(columns), len(seen.order))
        both = (xp.broadcast_to(x, (S, x.shape[1])) for x in (columns, seen.order))
        columns = xp.take_along_axis(*both, axis=1)
    times_q = xp.broadcast_to(xp.asarray(dropout.times_q, np.int64), (B, Tq))
    return words, dense(times_q), dense(columns)


def _fits(x: Any) -> bool:
    """Return whether kernels accept the strides of `x`.

    The last dim must be contiguous, all other strides multiples of the 16 bytes that v2 moves at a
    time.
    """
    return (
        x.strides[3] == x.itemsize
        and address(x) % 16 == 0
        and not any(stride % 16 for stride in x.strides[:3])
    )


def _readable(x: Any) -> Any:
    return x if _fits(x) else namespace(x).array(x, copy=True, order="C")


def _writable(x: Any, like: Any) -> Any:
    """Return an array for a result, which `deliver` takes.

    It is `x` if given and suitable, else a new one like `like`.
    """
    return x if x is not None and _fits(x) else empty(like.shape, like.dtype, like)


def _struct(
    seen: DeviceTable,
    scale: float,
    dropout: AttentionDropout | None,
    columns: Any,
    cap: float,
    **arrays: Any,
) -> Any:
    """Return the struct Attention for arrays q, k and so on, by name."""
    strides = tuple(
        (name, tuple(stride // x.itemsize for stride in x.strides[:3]))
        for name, x in arrays.items()
    )
    (_, Tq, H, _), (_, Tk, Hkv, _) = arrays["q"].shape, arrays["k"].shape
    column_step = Tk if columns is not None and len(columns) > 1 else 0
    sizes = Tq, Tk, H, Hkv, int(seen.causal), seen.step, column_step
    return _packed(strides, sizes, scale, 0.0 if dropout is None else dropout.p, cap)


@functools.lru_cache(1024)
def _packed(
    strides: tuple[tuple[str, tuple[int, ...]], ...],
    sizes: tuple[int, ...],
    scale: float,
    p: float,
    cap: float,
) -> Any:
    a = np.zeros((), _ATTENTION)
    for name, value in (*strides, *zip((*_SIZES, *_STEPS), sizes, strict=True)):
        a[name] = value
    a["scale"], a["threshold"], a["keep_scale"] = scale, threshold(p), 1 / (1 - p)
    a["cap"], a["per_cap"] = cap, 1 / cap if cap else 0
    return a[()]


def _launch(name: str, tiles: Tiles, samples: int, heads: int, rows: int, *args: Any) -> None:
    """Launch a block for every tile of `rows` rows of every head of every sample."""
    grid = (-(-rows // tiles.own), heads, samples)
    launch(tiles.path, name, tiles.defines, grid, (tiles.threads,), args, tiles.shared_bytes)


# ---- the ops


def _forward(
    variant: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
    out: Any = None,
) -> tuple[Any, Any]:
    same_dtype(q, k, v, out)
    seen = device_table(visibility, q, k)
    if variant == "v3":
        refuse_cap(variant, cap)
        return _forward_v3(q, k, v, seen, scale, dropout, out)
    plan = plan_of(variant, q, scale, dropout, cap)
    B, Tq, H, _ = q.shape
    q, k, v = _readable(q), _readable(seen.sorted(k)), _readable(seen.sorted(v))
    o, lse = _writable(out, q), empty((B, H, Tq), np.float32, q)
    extras = (seen.table, *_words(dropout, seen, q))
    a = _struct(seen, scale, dropout, extras[-1], cap, q=q, k=k, v=v, o=o)
    _launch("attention_forward", plan.forward, B, H, Tq, q, k, v, o, lse, *extras, a)
    return deliver(o, out), lse


def _backward(
    variant: str,
    grad_o: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    scale: float,
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
    grad_q: Any = None,
    grad_k: Any = None,
    grad_v: Any = None,
) -> tuple[Any, Any, Any]:
    same_dtype(q, k, v, o, grad_o, grad_q, grad_k, grad_v)
    seen = device_table(visibility, q, k)
    if variant == "v3":
        refuse_cap(variant, cap)
        return _backward_v3(
            (grad_o, o, q, k, v), lse, seen, scale, dropout, (grad_q, grad_k, grad_v)
        )
    plan = plan_of(variant, q, scale, dropout, cap)
    (B, Tq, H, _), (Tk, Hkv) = q.shape, k.shape[1:3]
    grad_o, o, q, k, v = map(_readable, (grad_o, o, q, seen.sorted(k), seen.sorted(v)))
    lse = dense(lse.astype(np.float32, copy=False))
    gq, gk, gv = (
        _writable(grad_q, q),
        *(_writable(g if seen.order is None else None, k) for g in (grad_k, grad_v)),
    )
    extras = (seen.table, *_words(dropout, seen, q))
    arrays = dict(q=q, k=k, v=v, o=o, grad_o=grad_o, grad_q=gq, grad_k=gk, grad_v=gv)
    a = _struct(seen, scale, dropout, extras[-1], cap, **arrays)
    padded = -(-Tq // plan.grad_kv.loop) * plan.grad_kv.loop
    lse_2, delta = empty((2, B, H, padded), np.float32, q)
    known = (grad_o, q, k, v, lse_2, delta, np.int32(padded))
    delta_rows = plan.grad_kv._replace(own=8, threads=256, shared_bytes=0)  # a warp a row
    _launch("attention_delta", delta_rows, B, H, padded, grad_o, o, lse, *known[4:], a)
    _launch("attention_grad_kv", plan.grad_kv, B, Hkv, Tk, *known, gk, gv, *extras, a)
    _launch("attention_grad_q", plan.grad_q, B, H, Tq, *known, gq, *extras, a)
    return deliver(gq, grad_q), seen.unsorted(gk, grad_k), seen.unsorted(gv, grad_v)


def _forward_v3(
    q: Any,
    k: Any,
    v: Any,
    seen: DeviceTable,
    scale: float,
    dropout: AttentionDropout | None,
    out: Any,
) -> tuple[Any, Any]:
    _require_v3(q, scale, dropout)
    q, k, v = hopper.tiled(q), hopper.tiled(seen.sorted(k)), hopper.tiled(seen.sorted(v))
    o = out if out is not None and hopper.can_be_tiled(out) else empty(q.shape, q.dtype, q)
    lse = empty((q.shape[0], q.shape[2], q.shape[1]), np.float32, q)
    hopper.forward(q, k, v, o, lse, scale, seen)
    return deliver(o, out), lse


def _backward_v3(
    arrays: tuple[Any, ...],
    lse: Any,
    seen: DeviceTable,
    scale: float,
    dropout: AttentionDropout | None,
    grads: tuple[Any, Any, Any],
) -> tuple[Any, Any, Any]:
    """`arrays`: grad_o, o, q, k, v."""
    grad_o, o, q, k, v = arrays
    _require_v3(q, scale, dropout)
    grad_o, o, q, k, v = map(hopper.tiled, (grad_o, o, q, seen.sorted(k), seen.sorted(v)))
    wanted = (grads[0], *(g if seen.order is None else None for g in grads[1:]))
    gq, gk, gv = (
        g if g is not None and hopper.can_be_tiled(g) else empty(x.shape, x.dtype, x)
        for g, x in zip(wanted, (q, k, v), strict=True)
    )
    hopper.backward(grad_o, q, k, v, o, lse, (gq, gk, gv), scale, seen)
    return deliver(gq, grads[0]), seen.unsorted(gk, grads[1]), seen.unsorted(gv, grads[2])


def _require_v3(q: Any, scale: float, dropout: AttentionDropout | None) -> None:
    """Raise KernelUnavailable if v3 does not support the arguments."""
    if reason := hopper.refusal(q, scale, dropout):
        raise KernelUnavailable(
            f"attention v3 does not take {reason}; use(attention='cuda:v2') does, or leave the "
            "choice to auto"
        )


def fastest(q: Any, options: Mapping[str, Any]) -> str:
    """Variant that `auto` takes for these queries and options of an attention op."""
    capability, scale = int(compute_capability(q.device.id)), options["scale"]
    if element(q) not in HALF_DTYPES or capability < 80 or not scale > 0 or options.get("cap"):
        return "v1"
    if capability != 90:
        return "v2"
    return "v2" if hopper.refusal(q, scale, options.get("dropout")) else "v3"


def _taken(like: Any, head_width: int, dropout: bool) -> str:
    """`fastest` for the attention of a causal model in training, on arrays such as `like`."""
    q = namespace(like).empty((1, 1, 1, head_width), like.dtype)
    return fastest(q, {"scale": 1.0, "dropout": dropout or None})


def _auto_forward(q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    return _forward(fastest(q, options), q, k, v, **options)


def _auto_backward(
    grad_o: Any, q: Any, k: Any, *arrays: Any, **options: Any
) -> tuple[Any, Any, Any]:
    return _backward(fastest(q, options), grad_o, q, k, *arrays, **options)


def _register(op: str, variant: str, fn: Any, dtypes: tuple[str, ...]) -> None:
    bound = functools.partial(fn, variant)
    bound.__module__ = __name__
    cuda_kernel(op, variant, dtypes=dtypes)(bound)


for _op, _auto in (("attention_forward", _auto_forward), ("attention_backward", _auto_backward)):
    kernel(
        _op, backend="cuda", variant="auto", dtypes=DTYPES, unavailable=unavailable, takes=_taken
    )(_auto)
for _variant, _dtypes in (("v1", DTYPES), ("v2", HALF_DTYPES), ("v3", HALF_DTYPES)):
    _register("attention_forward", _variant, _forward, _dtypes)
    _register("attention_backward", _variant, _backward, _dtypes)
