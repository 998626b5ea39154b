"""Messages between workers and parameter servers.

Each request is a header of `FIELDS` numbers, followed by arrays for `PUSH` and `SET`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

HEADER, DATA, REPLY = 0, 1, 2  # tags


class Op(IntEnum):
    """Kind of a request."""

    PUSH = 0  # a gradient follows
    NORM = 1  # reply: squared norm of this range's sum
    STEP = 2  # update with `lr` and `scale`
    PULL = 3  # reply: numbers, then weights
    GET = 4  # reply: a slice of an array
    SET = 5  # a slice of an array follows; reply: an empty one
    COUNT = 6  # `version` is the number of updates so far; reply: an empty array
    LEAVE = 7


class Request(NamedTuple):
    """Header of a request."""

    op: int
    clock: float = 0  # of the worker: updates that it has pushed before
    version: float = -1  # updates in the weights that the gradient was computed with
    lr: float = 0
    scale: float = 0
    numbers: tuple[float, ...] = (0, 0, 0, 0)
    """PULL: what all workers must agree on. GET, SET: index of stage and array, start, stop."""

    def pack(self) -> np.ndarray:
        """Return the header as [FIELDS] float64, which holds whole numbers up to 2^53."""
        numbers = (*self.numbers, 0.0, 0.0, 0.0, 0.0)[:4]
        return np.array([*self[:5], *numbers], np.float64)

    @classmethod
    def unpack(cls, header: np.ndarray) -> Request:
        """Return the request of a header."""
        op, clock, version, lr, scale, *numbers = header.tolist()
        return cls(Op(int(op)), int(clock), int(version), lr, scale, tuple(numbers))


FIELDS = 9  # numbers of a header
REPLY_FIELDS = 5  # version, version that the worker's last push was applied to, agreed numbers
