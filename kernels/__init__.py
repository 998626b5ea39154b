"""Kernels: arrays in, arrays out, nothing known of the rest of minillm.

Every operation has a folder with `reference.py`, its definition in NumPy; faster implementations register themselves beside it. Calling an operation here runs
the fastest one available for its arrays, or what `use` forces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import minillm.kernels.activation.reference
import minillm.kernels.adamw.reference
import minillm.kernels.dropout.reference
import minillm.kernels.embedding.reference
import minillm.kernels.grad_norm.reference
import minillm.kernels.layernorm.reference
import minillm.kernels.matmul.reference
import minillm.kernels.rmsnorm.reference
import minillm.kernels.softmax.reference
import minillm.kernels.softmax_xent.reference  # noqa: F401
from minillm.kernels.attention.reference import AttentionDropout
from minillm.kernels.pool import get_threads, limit_blas, parallel_for, threads
from minillm.kernels.random.reference import random_bits, random_normal, random_uniform
from minillm.kernels.registry import Kernel, KernelUnavailable, available, lookup, use
from minillm.kernels.rope.reference import rope_tables

__all__ = [
    "AttentionDropout", "Kernel", "KernelUnavailable", "available", "get_threads", "limit_blas", "lookup", "parallel_for", "random_bits", "random_normal",
    "random_uniform", "rope_tables", "threads", "use",
]  # fmt: skip


def _dispatch(op: str) -> Callable[..., Any]:
    """The operation as a function: looks its implementation up by its first argument at each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return lookup(op, args[0])(*args, **kwargs)

    call.__name__ = call.__qualname__ = op
    call.__doc__ = lookup(op).__doc__
    return call


matmul, column_sum = _dispatch("matmul"), _dispatch("column_sum")
layernorm_forward, layernorm_backward = _dispatch("layernorm_forward"), _dispatch("layernorm_backward")
rmsnorm_forward, rmsnorm_backward = _dispatch("rmsnorm_forward"), _dispatch("rmsnorm_backward")
gelu_forward, gelu_backward = _dispatch("gelu_forward"), _dispatch("gelu_backward")
relu_forward, relu_backward = _dispatch("relu_forward"), _dispatch("relu_backward")
swiglu_forward, swiglu_backward = _dispatch("swiglu_forward"), _dispatch("swiglu_backward")
softmax_forward, softmax_backward = _dispatch("softmax_forward"), _dispatch("softmax_backward")
xent_max, xent_shifted_sum_, xent_grad_ = _dispatch("xent_max"), _dispatch("xent_shifted_sum_"), _dispatch("xent_grad_")
attention_forward, attention_backward = _dispatch("attention_forward"), _dispatch("attention_backward")
rope_ = _dispatch("rope_")
dropout_forward = _dispatch("dropout_forward")
adamw_, sgd_, sum_of_squares = _dispatch("adamw_"), _dispatch("sgd_"), _dispatch("sum_of_squares")


def embedding_forward(ids: Any, weight: Any, first_row: int = 0) -> Any:
    """See kernels/embedding/reference.py."""
    return lookup("embedding_forward", weight)(ids, weight, first_row)


def embedding_backward_(grad_y: Any, ids: Any, grad_weight: Any, first_row: int = 0, accumulate: bool = True) -> None:
    """See kernels/embedding/reference.py."""
    lookup("embedding_backward_", grad_y)(grad_y, ids, grad_weight, first_row, accumulate)


def dropout_mask(p: float, key: int, samples: Any, times: Any, channels: Any, dtype: Any) -> Any:
    """See kernels/dropout/reference.py."""
    return lookup("dropout_mask")(p, key, samples, times, channels, dtype)
