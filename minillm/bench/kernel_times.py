"""Times of every implementation of a training step's operations: `minillm bench kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.errors import ConfigError
from minillm.base.record import Record
from minillm.bench.timing import median_seconds, write_json
from minillm.comm.communicator import Communicator
from minillm.comm.cores import usable_cores
from minillm.kernels.gpu_check.report import table

CPU_BACKENDS = ("numpy", "c")  # the emulator is for the correctness of a CUDA kernel, not its speed


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


class Work:
    """One call of an operation.

    `num_bytes` are read or written once; `flops` are floating-point operations, 0 where memory is
    the limit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        num_bytes: float,
        *args: Any,
        flops: float = 0,
        **more: Any,
    ) -> None:
        self.op, self.num_bytes, self.flops = function.__name__, num_bytes, flops
        self.call = partial(function, *args, **more)


def works(args: KernelBench) -> Iterator[Work]:
    """Yield the calls of a training step at the sizes of the flags."""
    rng = np.random.default_rng(0)
    R, D, F, V, T = args.rows, args.dim, 4 * args.dim, args.vocab, args.context

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x, grad, weight, bias = normal(R, D), normal(R, D), normal(D), normal(D)
    wide, grad_wide, grad_half, matrix = normal(R, F), normal(R, F), normal(R, F // 2), normal(F, D)
    _, mean, rstd = kernels.layernorm_forward(x, weight, bias, 1e-5)
    size = 4.0 * R * D
    yield Work(kernels.layernorm_forward, 2 * size, x, weight, bias, 1e-5)
    yield Work(kernels.layernorm_backward, 3 * size, grad, x, weight, mean, rstd)
    yield Work(kernels.rmsnorm_forward, 2 * size, x, weight, 1e-5)
    yield Work(kernels.rmsnorm_backward, 3 * size, grad, x, weight, rstd)
    yield Work(kernels.add, 3 * size, x, grad)
    yield Work(kernels.gelu_forward, 8 * size, wide, "tanh")
    yield Work(kernels.gelu_backward, 12 * size, grad_wide, wide, "tanh")
    yield Work(kernels.swiglu_forward, 6 * size, wide)
    yield Work(kernels.swiglu_backward, 10 * size, grad_half, wide)
    yield Work(kernels.column_sum, 4 * size, wide)
    yield Work(kernels.matmul, 5 * size + matrix.nbytes, x, matrix.T, flops=2.0 * R * D * F)
    logits, targets = normal(R, V), rng.integers(0, V, R)
    # A shift of 10 keeps the exponentials small when the call repeats in place.
    shift, sums, scale = (np.full(R, number, np.float32) for number in (10, 1, 1e-3))
    yield Work(kernels.xent_max, logits.nbytes, logits)
    yield Work(kernels.xent_shifted_sum_, 2 * logits.nbytes, logits, shift, targets, 0)
    yield Work(kernels.xent_grad_, 2 * logits.nbytes, logits, sums, targets, 0, scale)
    ids, rows = rng.integers(0, V, (R,)), normal(V, D)
    yield Work(kernels.embedding_forward, 2 * size, ids, rows)
    yield Work(kernels.embedding_backward_, 3 * size, x, ids, rows)
    address = (7, np.arange(R // T), np.arange(T), np.arange(D))
    yield Work(kernels.dropout_forward, 2 * size, x.reshape(-1, T, D), 0.1, *address)
    flat = [normal(8 << 20) for _ in range(3)] + [np.ones(8 << 20, np.float32)]
    adamw: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    yield Work(kernels.adamw_, 7.0 * flat[0].nbytes, *flat, step=10, **adamw)
    yield Work(kernels.sum_of_squares, flat[0].nbytes, flat[0])
    B, H, K = R // T, D // 64, 64
    qkv, grad = normal(B, T, 3 * H, K), normal(B, T, H, K)
    q, k, v = (qkv[:, :, i * H : (i + 1) * H] for i in range(3))
    cos, sin = kernels.rope_tables(np.arange(T), K, 1e4, np.float32)
    options: dict[str, Any] = dict(scale=K**-0.5, visibility=kernels.Visibility())
    o, lse = kernels.attention_forward(q, k, v, **options)
    size, flops = float(grad.nbytes), 2.0 * B * H * T * T * K  # of the causal half, forward
    yield Work(kernels.rope_, 2 * size, q, cos, sin)
    yield Work(kernels.attention_forward, 4 * size, q, k, v, flops=flops, **options)
    operands = (grad, q, k, v, o, lse)
    yield Work(kernels.attention_backward, 8 * size, *operands, flops=2.5 * flops, **options)


def run(comm: Communicator, args: KernelBench) -> None:
    """Time all implementations and print the table."""
    threads = args.threads or usable_cores()
    sizes = f"{args.rows} x {args.dim}, context {args.context}, vocabulary {args.vocab}"
    print(f"{sizes}, {threads} threads, float32", flush=True)
    with kernels.threads(threads):
        found: list[dict[str, Any]] = [
            dict(op=work.op, choice=choice, seconds=s, bytes=work.num_bytes, flops=work.flops)
            for work in works(args)
            if args.only in work.op
            for choice, s in _times(work)
        ]
    rows = [
        [one["op"], one["choice"], f"{one['seconds'] * 1e3:.3f}", _rate(**one)] for one in found
    ]
    print(table(("operation", "implementation", "ms", "rate"), rows))
    write_json(args.json, {"threads": threads, "results": found})


def _times(work: Work) -> Iterator[tuple[str, float]]:
    """Yield the implementations that run on this machine's cores, with their seconds."""
    for kernel in kernels.available(work.op):
        if kernel.unavailable is None and kernel.backend in CPU_BACKENDS:
            with kernels.use(**{work.op: kernel.choice}):
                yield kernel.choice, median_seconds(work.call)


def _rate(seconds: float, bytes: float, flops: float, **_: Any) -> str:
    if flops:
        return f"{flops / seconds / 1e9:.0f} GFLOP/s"
    return f"{bytes / seconds / 1e9:.1f} GB/s"
