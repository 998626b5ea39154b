"""Gradient slots: where backward adds up the gradient of a parameter, without a pass to zero it."""

from __future__ import annotations

from minillm.base.arrays import Array


class GradSlot:
    """Accumulator of a parameter's gradient.

    `buf` holds garbage until the first write, and the sum of all writes after that.
    """

    __slots__ = ("buf", "writes")

    def __init__(self, buf: Array) -> None:
        self.buf = buf
        self.writes = 0

    def add(self, grad: Array) -> None:
        """Add `grad`, of the buffer's shape. It may be `fresh`, with the gradient computed into it.

        The first write overwrites, so that no pass has to zero the buffer.
        """
        if self.writes:
            buf = self.buf  # which may be a property
            buf += grad
        elif grad is not self.buf:
            self.buf[...] = grad
        self.writes += 1

    @property
    def fresh(self) -> Array | None:
        """Buffer before the first write, for computing that write in place; None after it."""
        return None if self.writes else self.buf

    def finish(self) -> None:
        """Make the buffer valid for a reduction: zero it if it was never written."""
        if not self.writes:
            self.buf[...] = 0


def fresh_of(slot: GradSlot | None) -> Array | None:
    """Return the memory for computing a slot's first gradient in place, if there is any."""
    return None if slot is None else slot.fresh
