"""Softmax cross-entropy in place on logits whose vocabulary may be cut over ranks.

Three steps, between which the caller combines the parts of the ranks: `xent_max`, the maximum of
each row; `xent_shifted_sum_`, exponentials with their sum and the target's logit; `xent_grad_`.
Columns from `valid_columns` on are padding and count as minus infinity.

Two steps move three fifths of the bytes, where exponentials cost less than memory, as on a GPU:
`xent_statistics` reads the logits once and leaves them; the caller combines maxima M_r and sums S_r
of the ranks as M = max M_r, S = sum of S_r exp(M_r - M); `xent_grad_from_logits_` overwrites them.
The loss is M + log(S) - target_logit.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def xent_max(logits: Any, valid_columns: int | None = None) -> Any:
    """Row maxima [rows] of logits [rows, V_local]; minus infinity where all columns are padding."""
    return logits[:, :valid_columns].max(1, initial=-np.inf)


def xent_shifted_sum_(
    logits: Any, row_max: Any, targets: Any, first_class: int, valid_columns: int | None = None
) -> tuple[Any, Any]:
    """Overwrite the logits with e = exp(logits - row_max), 0 for padding.

    logits: [rows, V_local]; row_max: [rows], over the whole vocabulary; targets: [rows], integers.
    first_class: the class of column 0.
    Returns the sums of e [rows] and the targets' shifted logits [rows]. The latter are 0 for
    targets outside [first_class, first_class + valid_columns), which other ranks hold.
    """
    logits -= row_max[:, None]
    target_logit = _of_targets(logits, targets, first_class, valid_columns)
    np.exp(logits[:, :valid_columns], out=logits[:, :valid_columns])
    logits[:, _width(logits, valid_columns) :] = 0
    return logits.sum(1), target_logit


def xent_grad_(
    exp_logits: Any, sum_exp: Any, targets: Any, first_class: int, row_scale: Any
) -> None:
    """Overwrite exp_logits with the logits' gradient, (softmax - onehot(target)) row_scale.

    exp_logits: [rows, V_local], as `xent_shifted_sum_` left it; sum_exp: [rows], over the whole
    vocabulary; targets, first_class: as there; row_scale: [rows], the gradient of each loss.
    """
    classes = first_class + np.arange(exp_logits.shape[1])
    one_hot = targets[:, None] == classes
    exp_logits[...] = (exp_logits / sum_exp[:, None] - one_hot) * row_scale[:, None]


def xent_statistics(
    logits: Any, targets: Any, first_class: int, valid_columns: int | None = None
) -> tuple[Any, Any, Any]:
    """Row maxima, sums of exp(logits - maximum) and the targets' logits, [rows] each.

    logits: [rows, V_local]; targets: [rows], integers; first_class: the class of column 0.
    Where all columns are padding, the maximum is minus infinity and the sum 0. The logit is 0 for
    targets outside [first_class, first_class + valid_columns).
    """
    row_max = xent_max(logits, valid_columns)
    sums = np.exp(logits[:, :valid_columns] - row_max[:, None]).sum(1)
    return row_max, sums, _of_targets(logits, targets, first_class, valid_columns)


def xent_grad_from_logits_(
    logits: Any,
    row_max: Any,
    sum_exp: Any,
    targets: Any,
    first_class: int,
    row_scale: Any,
    valid_columns: int | None = None,
) -> None:
    """Overwrite logits [rows, V_local] with their gradient, padding with 0.

    row_max, sum_exp: [rows], over the whole vocabulary. The rest: as in `xent_grad_`.
    """
    xent_shifted_sum_(logits, row_max, targets, first_class, valid_columns)
    xent_grad_(logits, sum_exp, targets, first_class, row_scale)


def _width(logits: Any, valid_columns: int | None) -> int:
    return logits.shape[1] if valid_columns is None else valid_columns


def _of_targets(logits: Any, targets: Any, first_class: int, valid_columns: int | None) -> Any:
    """Return the logit of each row's target, 0 where it is not among the valid columns."""
    found = np.zeros(len(logits), logits.dtype)
    for row, target in enumerate(targets):
        if 0 <= target - first_class < _width(logits, valid_columns):
            found[row] = logits[row, target - first_class]
    return found
