"""`python -m minillm.bench kernels`: every implementation of the training step's operations, side
by side."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.errors import ConfigError
from minillm.base.record import Record
from minillm.bench.timing import median_seconds, table
from minillm.comm.cores import usable_cores

CPU_BACKENDS = ("numpy", "c")  # the emulator shows what a CUDA kernel does, not how fast it is


@dataclass(frozen=True, kw_only=True)
class KernelBench(Record):
    """Time every implementation of every operation of a training step."""

    rows: int = 2048
    """Tokens in a microbatch."""
    dim: int = 384
    """Width of the model."""
    context: int = 256
    """Length of the sequences."""
    vocab: int = 8192
    """Columns of the logits."""
    threads: int = 0
    """Threads; 0: one for each core."""
    only: str = ""
    """Run only operations whose name contains this."""
    json: str | None = None
    """File to write the results to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows % self.context or self.dim % 64:
            raise ConfigError(
                f"--rows {self.rows} must be a multiple of --context {self.context}, and --dim "
                f"{self.dim} one of 64"
            )


@dataclass(frozen=True)
class Work:
    """One call: the op, its bytes read and written once, its floating-point operations where they
    matter, and the call."""

    op: str
    num_bytes: float
    flops: float
    call: Callable[[], Any]


def works(args: KernelBench) -> Iterator[Work]:
    """The calls of a training step at the sizes asked for."""
    rng = np.random.default_rng(0)
    R, D, F, V, T = args.rows, args.dim, 4 * args.dim, args.vocab, args.context

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x, grad, weight, bias = normal(R, D), normal(R, D), normal(D), normal(D)
    wide, grad_wide, grad_half, matrix = normal(R, F), normal(R, F), normal(R, F // 2), normal(F, D)
    _, mean, rstd = kernels.layernorm_forward(x, weight, bias, 1e-5)
    size = 4.0 * R * D
    yield Work(
        "layernorm_forward", 2 * size, 0, lambda: kernels.layernorm_forward(x, weight, bias, 1e-5)
    )
    yield Work(
        "layernorm_backward",
        3 * size,
        0,
        lambda: kernels.layernorm_backward(grad, x, weight, mean, rstd),
    )
    yield Work("rmsnorm_forward", 2 * size, 0, lambda: kernels.rmsnorm_forward(x, weight, 1e-5))
    yield Work(
        "rmsnorm_backward", 3 * size, 0, lambda: kernels.rmsnorm_backward(grad, x, weight, rstd)
    )
    yield Work("add", 3 * size, 0, lambda: kernels.add(x, grad))
    yield Work("gelu_forward", 8 * size, 0, lambda: kernels.gelu_forward(wide, "tanh"))
    yield Work(
        "gelu_backward", 12 * size, 0, lambda: kernels.gelu_backward(grad_wide, wide, "tanh")
    )
    yield Work("swiglu_forward", 6 * size, 0, lambda: kernels.swiglu_forward(wide))
    yield Work("swiglu_backward", 10 * size, 0, lambda: kernels.swiglu_backward(grad_half, wide))
    yield Work("column_sum", 4 * size, 0, lambda: kernels.column_sum(wide))
    yield Work(
        "matmul", 5 * size + matrix.nbytes, 2.0 * R * D * F, lambda: kernels.matmul(x, matrix.T)
    )
    logits, targets = normal(R, V), rng.integers(0, V, R)
    # A shift of 10: repeated in place, the exponentials stay small.
    shift, sums, scale = (
        np.full(R, 10, np.float32),
        np.ones(R, np.float32),
        np.full(R, 1e-3, np.float32),
    )
    yield Work("xent_max", logits.nbytes, 0, lambda: kernels.xent_max(logits))
    yield Work(
        "xent_shifted_sum_",
        2 * logits.nbytes,
        0,
        lambda: kernels.xent_shifted_sum_(logits, shift, targets, 0),
    )
    yield Work(
        "xent_grad_",
        2 * logits.nbytes,
        0,
        lambda: kernels.xent_grad_(logits, sums, targets, 0, scale),
    )
    ids, table_ = rng.integers(0, V, (R,)), normal(V, D)
    yield Work("embedding_forward", 2 * size, 0, lambda: kernels.embedding_forward(ids, table_))
    yield Work(
        "embedding_backward_", 3 * size, 0, lambda: kernels.embedding_backward_(x, ids, table_)
    )
    by_time = x.reshape(-1, T, D)
    address = (7, np.arange(R // T), np.arange(T), np.arange(D))
    yield Work(
        "dropout_forward", 2 * size, 0, lambda: kernels.dropout_forward(by_time, 0.1, *address)
    )
    flat = [normal(8 << 20) for _ in range(3)] + [np.ones(8 << 20, np.float32)]
    adamw = functools.partial(
        kernels.adamw_, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10
    )
    yield Work("adamw_", 7.0 * flat[0].nbytes, 0, lambda: adamw(*flat))
    yield Work("sum_of_squares", flat[0].nbytes, 0, lambda: kernels.sum_of_squares(flat[0]))
    yield from _attention(args, normal)


def _attention(args: KernelBench, normal: Callable[..., np.ndarray]) -> Iterator[Work]:
    B, T, H, K = args.rows // args.context, args.context, args.dim // 64, 64
    qkv = normal(B, T, 3 * H, K)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : 2 * H], qkv[:, :, 2 * H :]
    cos, sin = kernels.rope_tables(np.arange(T), K, 1e4, np.float32)
    seen = kernels.Visibility()
    o, lse = kernels.attention_forward(q, k, v, scale=K**-0.5, visibility=seen)
    grad = normal(B, T, H, K)
    flops = 2.0 * B * H * T * T * K  # of the causal half, forward
    yield Work("rope_", 2 * grad.nbytes, 0, lambda: kernels.rope_(q, cos, sin))
    yield Work(
        "attention_forward",
        4 * grad.nbytes,
        flops,
        lambda: kernels.attention_forward(q, k, v, scale=K**-0.5, visibility=seen),
    )
    yield Work(
        "attention_backward",
        8 * grad.nbytes,
        2.5 * flops,
        lambda: kernels.attention_backward(grad, q, k, v, o, lse, scale=K**-0.5, visibility=seen),
    )


def run(args: KernelBench) -> None:
    """Time everything and print the table."""
    threads = args.threads or usable_cores()
    kernels.prepare_process()
    rows, found = [], []
    print(
        f"{args.rows} x {args.dim}, context {args.context}, vocabulary {args.vocab}, {threads} "
        "threads, float32",
        flush=True,
    )
    with kernels.threads(threads):
        for work in works(args):
            if args.only not in work.op:
                continue
            for entry in (
                k
                for k in kernels.available(work.op)
                if k.unavailable is None and k.backend in CPU_BACKENDS
            ):
                with kernels.use(**{work.op: entry.choice}):
                    seconds = median_seconds(work.call)
                rate = (
                    f"{work.flops / seconds / 1e9:.0f} GFLOP/s"
                    if work.flops
                    else f"{work.num_bytes / seconds / 1e9:.1f} GB/s"
                )
                rows.append([work.op, entry.choice, f"{seconds * 1e3:.3f}", rate])
                found.append(
                    {
                        "op": work.op,
                        "choice": entry.choice,
                        "seconds": seconds,
                        "bytes": work.num_bytes,
                        "flops": work.flops,
                    }
                )
    print(table(("operation", "implementation", "ms", "rate"), rows))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"threads": threads, "results": found}, indent=1) + "\n"
        )
