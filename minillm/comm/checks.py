"""Checks of a collective: its arguments on this rank, and its order across the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm.base.arrays import Array
from minillm.base.errors import CommError
from minillm.comm.buffers import SUM, ReduceOp, cut
from minillm.comm.ledger import describe

if TYPE_CHECKING:
    from minillm.comm.communicator import Communicator

MAX_TAG = 32_766  # MPI promises tags up to 32767; the last one is reserved for all_to_all
_SIGNATURE_BYTES = 256


def reducible(comm: Communicator, x: Array, op: ReduceOp) -> None:
    """Raise CommError for a sum of bool arrays."""
    if x.dtype.kind == "b" and op is SUM:
        raise CommError(
            f"a sum of bool arrays on {comm.name!r} has no meaning; convert to an integer, or use "
            "MAX (any) or MIN (all)"
        )


def dim(comm: Communicator, x: Array, dim: int) -> int:
    """Return `dim` counted from the front. Raises CommError if `x` does not have it."""
    if not -x.ndim <= dim < x.ndim:
        raise CommError(f"dim {dim} does not exist in shape {x.shape} (on {comm.name!r})")
    return dim % x.ndim


def sizes(comm: Communicator, operation: str, sizes: Sequence[int], length: int, own: bool) -> None:
    """Raise CommError unless `sizes` has an entry per rank and fits an array of this `length`.

    The length is that of this rank's shard (`own`), else that of all shards together.
    """
    if len(sizes) != comm.size or min(sizes) < 0:
        raise CommError(
            f"{operation} on {comm.name!r}: sizes {list(sizes)} must be {comm.size} numbers >= 0"
        )
    expected = sizes[comm.rank] if own else sum(sizes)
    if expected != length:
        what = f"sizes[{comm.rank}]" if own else "the sum of sizes"
        raise CommError(
            f"{operation} on {comm.name!r}: {what} of {list(sizes)} is {expected}, but the array "
            f"has {length}"
        )


def rank(comm: Communicator, rank: int, what: str, tag: int = 0) -> None:
    """Raise CommError for a rank outside the group or a tag out of range."""
    if not 0 <= rank < comm.size:
        raise CommError(
            f"{what}={rank} is not a rank of {comm.name!r}, which has ranks 0 to {comm.size - 1}"
        )
    if not 0 <= tag <= MAX_TAG:
        raise CommError(f"tag {tag} on {comm.name!r} is outside 0 to {MAX_TAG}")


def same_collective(comm: Communicator, signature: tuple[Any, ...]) -> None:
    """Exchange signatures before a collective, so that a mismatch is an error and no deadlock.

    Raises CommError on every rank, naming what each rank calls. Collective.
    """
    text = describe(signature).encode()[:_SIGNATURE_BYTES]
    own = np.zeros(_SIGNATURE_BYTES, np.uint8)
    own[: len(text)] = np.frombuffer(text, np.uint8)
    counts = [_SIGNATURE_BYTES] * comm.size
    callers: dict[str, list[int]] = {}
    for index, row in enumerate(cut(comm._all_gather(own, counts), counts)):
        called = row.tobytes().rstrip(b"\0").decode(errors="replace")
        callers.setdefault(called, []).append(index)
    if len(callers) > 1:
        difference = ", but ".join(f"{what} on ranks {ranks}" for what, ranks in callers.items())
        raise CommError(
            f"ranks of {comm.name!r} call different collectives: number {comm.num_compared} is "
            f"{difference}"
        )
    comm.num_compared += 1
