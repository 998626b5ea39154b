"""Cases of the kernel test: softmax_xent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import Arrays, Case
from minillm.kernels.softmax import reference as softmax

from minillm import kernels


def cases() -> Iterator[Case]:
    for R, V, valid, parts in (
        (0, 5, 5, 1),
        (3, 1, 1, 1),
        (9, 65, 65, 1),
        (9, 66, 61, 3),
        (700, 96, 95, 2),
        (2, 20_000, 20_000, 1),
        (5, 8, 3, 4),
    ):

        def make(rng: Any, R: int = R, V: int = V, valid: int = valid) -> Arrays:
            return 20 * rng.standard_normal((R, V)), rng.integers(0, valid, R), rng.random(R)

        for name, call in (("", cut_cross_entropy), ("two-steps-", cut_cross_entropy_in_two_steps)):
            yield Case(
                "softmax_xent",
                f"{name}{R}x{V}-valid{valid}-parts{parts}",
                make,
                lambda x, t, s, call=call, valid=valid, parts=parts: call(x, t, s, valid, parts),
                lambda x, t, s, valid=valid: cross_entropy(x, t, s, valid),
            )


def cross_entropy(logits: Any, targets: Any, row_scale: Any, valid: int) -> Arrays:
    """Return losses [rows] and the gradient of sum(row_scale * loss) by the logits.

    Whole rows are computed at once, without the steps between ranks. Columns from `valid` on do not
    exist.
    """
    p = np.zeros_like(logits)
    p[:, :valid] = softmax.softmax_forward(logits[:, :valid])
    rows, one_hot = np.arange(len(logits)), np.zeros_like(logits)
    one_hot[rows, targets] = 1
    return -np.log(p[rows, targets]), (p - one_hot) * row_scale[:, None]


def cut_cross_entropy(logits: Any, targets: Any, row_scale: Any, valid: int, parts: int) -> Arrays:
    """Return losses and gradient with the vocabulary cut into equal parts.

    The parts are combined as ranks would combine them.
    """
    width, pieces, valids = cut_logits(logits, valid, parts)
    row_max = np.max(
        [kernels.xent_max(p, valid_columns=n) for p, n in zip(pieces, valids, strict=True)], axis=0
    )
    sums = [
        kernels.xent_shifted_sum_(p, row_max, targets, i * width, valid_columns=n)
        for i, (p, n) in enumerate(zip(pieces, valids, strict=True))
    ]
    sum_exp, target_logit = (sum(s[i] for s in sums) for i in (0, 1))
    for i, piece in enumerate(pieces):
        kernels.xent_grad_(piece, sum_exp, targets, i * width, row_scale)
    return np.log(sum_exp) - target_logit, np.concatenate(pieces, axis=1)


def cut_cross_entropy_in_two_steps(
    logits: Any, targets: Any, row_scale: Any, valid: int, parts: int
) -> Arrays:
    """Return the same from statistics and a gradient that starts from the logits."""
    width, pieces, valids = cut_logits(logits, valid, parts)
    cuts = list(enumerate(zip(pieces, valids, strict=True)))
    found = [kernels.xent_statistics(p, targets, i * width, valid_columns=n) for i, (p, n) in cuts]
    row_max = np.max([top for top, _, _ in found], axis=0)
    sum_exp = sum(total * np.exp(top - row_max) for top, total, _ in found)
    for i, (p, n) in cuts:
        kernels.xent_grad_from_logits_(
            p, row_max, sum_exp, targets, i * width, row_scale, valid_columns=n
        )
    return np.log(sum_exp) + row_max - sum(logit for _, _, logit in found), np.concatenate(
        pieces, axis=1
    )


def cut_logits(logits: Any, valid: int, parts: int) -> tuple[int, list[Any], list[int]]:
    """Return the width of a part, copies of the parts, and the valid columns of each.

    The padding of a part holds large values.
    """
    width = logits.shape[1] // parts
    pieces = [logits[:, i * width : (i + 1) * width].copy() for i in range(parts)]
    valids = [min(max(valid - i * width, 0), width) for i in range(parts)]
    for piece, n in zip(pieces, valids, strict=True):
        piece[:, n:] = 1e4
    return width, pieces, valids
