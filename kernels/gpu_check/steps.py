"""Rates of a training step's other kernels, as a share of the copy ceiling.

All but attention are bound by memory bandwidth.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.gpu_check.measure import bfloat16, normal, seconds
from minillm.kernels.gpu_check.report import error_line

ROWS, DIM, VOCAB, HEAD_WIDTH = 65536, 768, 50304, 64
LOGIT_ROWS = 8192
PARAMETERS = 124_000_000


class Work(NamedTuple):
    """Kernel call with its memory traffic: the bytes that it must read and write once."""

    name: str
    num_bytes: float
    call: Callable[[], Any]


def run(
    copy_tbs: float, deadline: float, save: Callable[[Any], None] = lambda rows: None
) -> list[dict[str, Any]]:
    """Time every kernel and return its row.

    A row holds `name`, `microseconds`, `megabytes`, `tbs` (TB/s) and `share`, TB/s over `copy_tbs`.
    A kernel that fails has `name` and `error` instead. So have the groups that are left after
    `deadline` seconds. `save` gets the rows after each kernel.
    """
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for make in (_norms, _elementwise, _logits, _embedding, _optimizer):
        if time.perf_counter() - start > deadline:
            rows.append({"name": make.__name__.strip("_"), "error": "not run, no time"})
            continue
        try:
            for work in make():
                rows.append(_measure(work, copy_tbs))
                save(rows)
        except Exception as error:
            rows.append({"name": make.__name__.strip("_"), "error": error_line(error)})
        importlib.import_module("cupy").get_default_memory_pool().free_all_blocks()
    return rows


def _measure(work: Work, copy_tbs: float) -> dict[str, Any]:
    try:
        each = seconds(work.call)
    except Exception as error:
        return {"name": work.name, "error": error_line(error)}
    rate = work.num_bytes / each / 1e12
    return {
        "name": work.name,
        "microseconds": each * 1e6,
        "megabytes": work.num_bytes / 1e6,
        "tbs": rate,
        "share": rate / copy_tbs,
    }


def _norms() -> Iterator[Work]:
    from minillm import kernels

    x, grad, delta = (normal((ROWS, DIM), bfloat16(), seed) for seed in range(3))
    weight, bias = normal((DIM,), bfloat16(), 3), normal((DIM,), bfloat16(), 4)
    size, total, out = x.nbytes, delta.copy(), grad.copy()
    _, mean, rstd = kernels.layernorm_forward(x, weight, bias, 1e-5)
    yield Work(
        "layernorm_forward", 2 * size, lambda: kernels.layernorm_forward(x, weight, bias, 1e-5)
    )
    yield Work(
        "layernorm_forward, residual",
        4 * size,
        lambda: kernels.layernorm_forward(x, weight, bias, 1e-5, delta, total),
    )
    yield Work(
        "layernorm_backward",
        3 * size,
        lambda: kernels.layernorm_backward(grad, x, weight, mean, rstd, grad_x_out=out),
    )
    yield Work(
        "layernorm_backward, residual",
        4 * size,
        lambda: kernels.layernorm_backward(
            grad, x, weight, mean, rstd, grad_x_out=out, grad_sum=delta
        ),
    )
    yield Work("rmsnorm_forward", 2 * size, lambda: kernels.rmsnorm_forward(x, weight, 1e-5))
    yield Work(
        "rmsnorm_backward",
        3 * size,
        lambda: kernels.rmsnorm_backward(grad, x, weight, rstd, grad_x_out=out),
    )
    yield Work("add", 3 * size, lambda: kernels.add(x, delta, out=out))


def _elementwise() -> Iterator[Work]:
    from minillm import kernels

    wide, grad = normal((ROWS, 4 * DIM), bfloat16()), normal((ROWS, 4 * DIM), bfloat16(), 1)
    half, size = normal((ROWS, 2 * DIM), bfloat16(), 2), wide.nbytes
    for kind in ("tanh", "erf"):
        yield Work(
            f"gelu_forward, {kind}", 2 * size, functools.partial(kernels.gelu_forward, wide, kind)
        )
        yield Work(
            f"gelu_backward, {kind}",
            3 * size,
            functools.partial(kernels.gelu_backward, grad, wide, kind),
        )
    bias = wide[0].copy()
    yield Work("gelu_forward, bias", 2 * size, lambda: kernels.gelu_forward(wide, "tanh", bias))
    yield Work("swiglu_forward", 1.5 * size, lambda: kernels.swiglu_forward(wide))
    yield Work("swiglu_backward", 2.5 * size, lambda: kernels.swiglu_backward(half, wide))
    yield Work("column_sum", size, lambda: kernels.column_sum(wide))
    yield Work("cast to float32", 3 * size, lambda: kernels.cast(wide, np.float32))
    T = 1024
    x = half[:, :DIM].copy().reshape(ROWS // T, T, DIM)
    address = (7, np.arange(ROWS // T), np.arange(T), np.arange(DIM))
    yield Work("dropout_forward", 2 * x.nbytes, lambda: kernels.dropout_forward(x, 0.1, *address))
    cos, sin = (
        importlib.import_module("cupy").asarray(t)
        for t in kernels.rope_tables(np.arange(T), HEAD_WIDTH, 1e4, np.float32)
    )
    heads = x.reshape(ROWS // T, T, DIM // HEAD_WIDTH, HEAD_WIDTH)
    yield Work("rope_", 2 * x.nbytes, lambda: kernels.rope_(heads, cos, sin))


def _logits() -> Iterator[Work]:
    from minillm import kernels

    cupy = importlib.import_module("cupy")
    logits = normal((LOGIT_ROWS, VOCAB), bfloat16())
    targets = cupy.asarray(np.random.default_rng(0).integers(0, VOCAB, LOGIT_ROWS))
    yield Work(
        "xent_statistics", logits.nbytes, lambda: kernels.xent_statistics(logits, targets, 0)
    )
    # The calls repeat in place: a shift of 10 and a factor of 1 neither overflow nor vanish.
    shift, ones = (cupy.full(LOGIT_ROWS, value, np.float32) for value in (10, 1))
    yield Work("xent_max", logits.nbytes, lambda: kernels.xent_max(logits))
    yield Work(
        "xent_shifted_sum_",
        2 * logits.nbytes,
        lambda: kernels.xent_shifted_sum_(logits, shift, targets, 0),
    )
    yield Work(
        "xent_grad_", 2 * logits.nbytes, lambda: kernels.xent_grad_(logits, ones, targets, 0, ones)
    )
    grad = functools.partial(kernels.xent_grad_from_logits_, logits, shift, ones, targets, 0, ones)
    yield Work("xent_grad_from_logits_", 2 * logits.nbytes, grad)


def _embedding() -> Iterator[Work]:
    from minillm import kernels

    cupy = importlib.import_module("cupy")
    # Zipf's law: one token in eleven is the most frequent one.
    frequency = 1 / np.arange(1, VOCAB + 1)
    ids = cupy.asarray(np.random.default_rng(0).choice(VOCAB, ROWS, p=frequency / frequency.sum()))
    table, grad = normal((VOCAB, DIM), bfloat16()), normal((ROWS, DIM), bfloat16(), 1)
    sums = cupy.zeros((VOCAB, DIM), np.float32)
    touched = len(np.unique(cupy.asnumpy(ids))) * DIM * 4
    yield Work("embedding_forward", 2 * grad.nbytes, lambda: kernels.embedding_forward(ids, table))
    yield Work(
        "embedding_backward_",
        grad.nbytes + 2 * touched,
        lambda: kernels.embedding_backward_(grad, ids, sums),
    )


def _optimizer() -> Iterator[Work]:
    from minillm import kernels

    cupy = importlib.import_module("cupy")
    param, m = normal((PARAMETERS,), np.float32), normal((PARAMETERS,), np.float32, 1)
    grad, copy, v = (
        normal((PARAMETERS,), bfloat16(), 2),
        cupy.empty(PARAMETERS, bfloat16()),
        cupy.ones(PARAMETERS, np.float32),
    )
    step = functools.partial(
        kernels.adamw_, lr=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10
    )
    scale = cupy.full(1, 0.5, np.float32)
    yield Work(
        "adamw_, bfloat16 with float32 master",
        28.0 * PARAMETERS,
        lambda: step(param, grad, m, v, grad_scale=scale, param_out=copy),
    )
    yield Work("sum_of_squares, float32", 4.0 * PARAMETERS, lambda: kernels.sum_of_squares(param))
    yield Work(
        "sum_arrays of 4, float32",
        20.0 * PARAMETERS,
        lambda: kernels.sum_arrays(m, (param, v, param, m)),
    )
    yield Work(
        "cast to bfloat16", 6.0 * PARAMETERS, lambda: kernels.cast(param, bfloat16(), out=copy)
    )
