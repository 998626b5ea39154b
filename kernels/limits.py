"""Limits of the kernels that a run can check before it allocates anything."""

from __future__ import annotations

from minillm.kernels.attention.plans import HEAD_WIDTHS
from minillm.kernels.gpu.grids import WIDEST_ROW


def refusal(device: str, *, head_width: int | None = None, row: int | None = None) -> str | None:
    """Return the reason why the kernels of `device` ("cpu" or "cuda") cannot take a size.

    `head_width` is the number of channels of an attention head, `row` that of a row of a norm.
    Returns None if they can.
    """
    if device != "cuda":
        return None
    if head_width is not None and head_width not in HEAD_WIDTHS:
        *most, last = map(str, HEAD_WIDTHS)
        return f"attention's CUDA kernels are for heads of {', '.join(most)} or {last}"
    if row is not None and row > WIDEST_ROW:
        return f"is more than the {WIDEST_ROW} channels that a norm's CUDA kernel holds"
    return None
