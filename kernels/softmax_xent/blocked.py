"""Softmax cross-entropy in NumPy, in blocks of rows that stay in cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.registry import kernel
from minillm.kernels.rows import row_blocks


@kernel("xent_max")
def xent_max(logits: Any, valid_columns: int | None = None) -> Any:
    valid = logits.shape[1] if valid_columns is None else valid_columns
    out = np.full(len(logits), -np.inf, logits.dtype)

    def run(rows: slice) -> None:
        np.max(logits[rows, :valid], axis=1, out=out[rows])

    if valid:
        row_blocks(len(logits), logits.shape[1] * logits.itemsize, run)
    return out


@kernel("xent_shifted_sum_")
def xent_shifted_sum_(
    logits: Any, row_max: Any, targets: Any, first_class: int, valid_columns: int | None = None
) -> tuple[Any, Any]:
    valid = logits.shape[1] if valid_columns is None else valid_columns
    sums, target_logit = np.empty(len(logits), logits.dtype), np.zeros(len(logits), logits.dtype)
    local = targets - first_class
    inside = (local >= 0) & (local < valid)

    def run(rows: slice) -> None:
        logits[rows, valid:] = 0
        block = logits[rows, :valid]
        block -= row_max[rows, None]
        hit = np.flatnonzero(inside[rows])
        target_logit[rows][hit] = block[hit, local[rows][hit]]
        np.exp(block, out=block)
        np.sum(block, axis=1, out=sums[rows])

    row_blocks(len(logits), logits.shape[1] * logits.itemsize, run)
    return sums, target_logit


@kernel("xent_grad_")
def xent_grad_(
    exp_logits: Any, sum_exp: Any, targets: Any, first_class: int, row_scale: Any
) -> None:
    local = targets - first_class
    inside = (local >= 0) & (local < exp_logits.shape[1])

    def run(rows: slice) -> None:
        block = exp_logits[rows]
        block *= (row_scale[rows] / sum_exp[rows])[:, None]
        hit = np.flatnonzero(inside[rows])
        block[hit, local[rows][hit]] -= row_scale[rows][hit]

    row_blocks(len(exp_logits), exp_logits.shape[1] * exp_logits.itemsize, run)


@kernel("xent_statistics")
def xent_statistics(
    logits: Any, targets: Any, first_class: int, valid_columns: int | None = None
) -> tuple[Any, Any, Any]:
    valid = logits.shape[1] if valid_columns is None else valid_columns
    row_max, sums, target_logit = (
        xent_max(logits, valid),
        np.zeros(len(logits), logits.dtype),
        np.zeros(len(logits), logits.dtype),
    )
    local = targets - first_class
    hit = np.flatnonzero((local >= 0) & (local < valid))
    target_logit[hit] = logits[hit, local[hit]]

    def run(rows: slice) -> None:
        np.sum(np.exp(logits[rows, :valid] - row_max[rows, None]), axis=1, out=sums[rows])

    if valid:
        row_blocks(len(logits), logits.shape[1] * logits.itemsize, run)
    return row_max, sums, target_logit


@kernel("xent_grad_from_logits_")
def xent_grad_from_logits_(
    logits: Any,
    row_max: Any,
    sum_exp: Any,
    targets: Any,
    first_class: int,
    row_scale: Any,
    valid_columns: int | None = None,
) -> None:
    valid = logits.shape[1] if valid_columns is None else valid_columns

    def run(rows: slice) -> None:
        block = logits[rows, :valid]
        block -= row_max[rows, None]
        np.exp(block, out=block)
        logits[rows, valid:] = 0

    row_blocks(len(logits), logits.shape[1] * logits.itemsize, run)
    xent_grad_(logits, sum_exp, targets, first_class, row_scale)
