"""Timed calls of a training step: attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    B, T, H, K = sizes.rows // sizes.context, sizes.context, sizes.dim // 64, 64
    qkv, grad = sizes.normals(B, T, 3 * H, K), sizes.normals(B, T, H, K)
    q, k, v = (qkv[:, :, i * H : (i + 1) * H] for i in range(3))
    options: dict[str, Any] = dict(scale=K**-0.5, visibility=kernels.Visibility())
    o, lse = kernels.attention_forward(q, k, v, **options)
    size, flops = grad.nbytes, 2.0 * B * H * T * T * K  # of the causal half, forward
    yield Call(kernels.attention_forward, 4 * size, q, k, v, flops=flops, **options)
    operands = (grad, q, k, v, o, lse)
    yield Call(kernels.attention_backward, 8 * size, *operands, flops=2.5 * flops, **options)
