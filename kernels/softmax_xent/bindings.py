"""Softmax cross-entropy in C, in place: logits must be C-contiguous, as the head makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import dense
from minillm.kernels.native import c_kernel, pool


def _ids(targets: Any) -> Any:
    return np.ascontiguousarray(targets, np.int64)


@c_kernel("xent_max")
def xent_max(c: Any, logits: Any, valid_columns: int | None = None) -> Any:
    num_rows, V = logits.shape
    out = np.empty(num_rows, logits.dtype)
    c.xent_max(
        pool(), dense(logits), out, num_rows, V, V if valid_columns is None else valid_columns
    )
    return out


@c_kernel("xent_shifted_sum_")
def xent_shifted_sum_(
    c: Any,
    logits: Any,
    row_max: Any,
    targets: Any,
    first_class: int,
    valid_columns: int | None = None,
) -> tuple[Any, Any]:
    num_rows, V = logits.shape
    sums, target_logit = np.empty(num_rows, logits.dtype), np.empty(num_rows, logits.dtype)
    valid = V if valid_columns is None else valid_columns
    c.xent_shifted_sum(
        pool(), logits, row_max, _ids(targets), sums, target_logit, num_rows, V, valid, first_class
    )
    return sums, target_logit


@c_kernel("xent_grad_")
def xent_grad_(
    c: Any, exp_logits: Any, sum_exp: Any, targets: Any, first_class: int, row_scale: Any
) -> None:
    num_rows, V = exp_logits.shape
    c.xent_grad(
        pool(), exp_logits, dense(sum_exp), row_scale, _ids(targets), num_rows, V, first_class
    )
