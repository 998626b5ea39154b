"""Softmax cross-entropy on the GPU, in place: logits must be C-contiguous.

Values of which a row has one are float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense, empty
from minillm.kernels.gpu.grids import threads_for
from minillm.kernels.gpu.launching import element, launch
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")


def _launch(name: str, logits: Any, *args: Any) -> None:
    """One block for each row of logits [rows, V]."""
    if not logits.flags.c_contiguous:
        raise ValueError("logits are overwritten in place, and must be C-contiguous")
    threads = threads_for(logits.shape[1], logits.dtype)
    launch(_FILE, name, {"ELEMENT": element(logits)}, (len(logits),), (threads,), (logits, *args))


def _floats(x: Any) -> Any:
    return dense(x.astype(np.float32, copy=False))


def _ids(targets: Any) -> Any:
    return dense(targets.astype(np.int64, copy=False))


@cuda_kernel("xent_max")
def xent_max(logits: Any, valid_columns: int | None = None) -> Any:
    num_rows, V = logits.shape
    out = empty(num_rows, np.float32, logits)
    _launch(
        "xent_max",
        dense(logits),
        out,
        np.int32(V),
        np.int32(V if valid_columns is None else valid_columns),
    )
    return out


@cuda_kernel("xent_shifted_sum_")
def xent_shifted_sum_(
    logits: Any, row_max: Any, targets: Any, first_class: int, valid_columns: int | None = None
) -> tuple[Any, Any]:
    num_rows, V = logits.shape
    sums, target_logit = empty(num_rows, np.float32, logits), empty(num_rows, np.float32, logits)
    valid = np.int32(V if valid_columns is None else valid_columns)
    args = (
        _floats(row_max),
        _ids(targets),
        sums,
        target_logit,
        np.int32(V),
        valid,
        np.int64(first_class),
    )
    _launch("xent_shifted_sum", logits, *args)
    return sums, target_logit


@cuda_kernel("xent_grad_")
def xent_grad_(
    exp_logits: Any, sum_exp: Any, targets: Any, first_class: int, row_scale: Any
) -> None:
    V = np.int32(exp_logits.shape[1])
    _launch(
        "xent_grad",
        exp_logits,
        _floats(sum_exp),
        _ids(targets),
        _floats(row_scale),
        V,
        np.int64(first_class),
    )


@cuda_kernel("xent_statistics")
def xent_statistics(
    logits: Any, targets: Any, first_class: int, valid_columns: int | None = None
) -> tuple[Any, Any, Any]:
    num_rows, V = logits.shape
    row_max, sums, target_logit = (empty(num_rows, np.float32, logits) for _ in range(3))
    valid = np.int32(V if valid_columns is None else valid_columns)
    _launch(
        "xent_statistics",
        dense(logits),
        _ids(targets),
        row_max,
        sums,
        target_logit,
        np.int32(V),
        valid,
        np.int64(first_class),
    )
    return row_max, sums, target_logit


@cuda_kernel("xent_grad_from_logits_")
def xent_grad_from_logits_(
    logits: Any,
    row_max: Any,
    sum_exp: Any,
    targets: Any,
    first_class: int,
    row_scale: Any,
    valid_columns: int | None = None,
) -> None:
    V = logits.shape[1]
    valid = np.int32(V if valid_columns is None else valid_columns)
    rows = (_floats(row_max), _floats(sum_exp), _ids(targets), _floats(row_scale))
    _launch("xent_grad_from_logits", logits, *rows, np.int32(V), valid, np.int64(first_class))
