"""The `Communicator`: everything a parallel method needs of other ranks.

The same layer runs on one rank (single.py), on threads of one process (threads.py) and on MPI
(mpi.py), with arrays on the host or on a GPU (device_arrays.py). Arrays travel as raw buffers and
metadata as JSON; nothing is pickled. All ranks of a group call its collectives in the same order. A
trailing underscore mutates the argument, a leading `i` returns a `Work`, and everything else
returns new arrays (in a group of one rank possibly the input itself).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from minillm.base.arrays import Array, dtype_name
from minillm.base.errors import CommError
from minillm.comm import checks
from minillm.comm.buffers import MAX, SUM, ReduceOp, contiguous, counts_along, cut, join, rank_major
from minillm.comm.ledger import Ledger, Operation, ledger
from minillm.comm.survivable import Survivable
from minillm.comm.work import DoneWork, SharedWindow, ThenWork, TrackedWork, Work

__all__ = ["DEFAULT_TIMEOUT", "MAX", "SUM", "Communicator", "ReduceOp", "SharedWindow", "Work"]

DEFAULT_TIMEOUT = 300.0  # seconds


class Communicator(Survivable):
    """A group of `size` ranks, of which this one is `rank`; `name` is its axis in the ledger.

    The public methods check their arguments, make arrays flat and write the ledger. A subclass
    implements the operations of `Transport` on flat buffers and the methods that make groups. A
    group of one rank returns its input, copies nothing and records nothing.
    """

    def __init__(self, rank: int, size: int, name: str, timeout: float) -> None:
        super().__init__(rank, size, name, timeout)
        self.num_compared = 0  # collectives compared under `Ledger.check_order`

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, rank {self.rank} of {self.size})"

    # ---- collectives on arrays

    def all_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Array:
        """Reduce `x` in place over the ranks, with the same bits on each. Returns `x`.

        `x` has the same shape and dtype on every rank.
        """
        checks.reducible(self, x, op)
        if self.size == 1:
            return x
        with self._collective(
            "all_reduce", kind, x.nbytes, "all_reduce", op.value, x.dtype, x.shape
        ):
            flat, copied = contiguous(x)
            self._all_reduce(flat, op)
            if copied:
                x[...] = flat.reshape(x.shape)
        return x

    def reduce_numbers(self, numbers: Sequence[float], op: ReduceOp = SUM) -> list[float]:
        """Reduce a few numbers for control over the ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        return self.all_reduce_(np.array(numbers, np.float64), op, kind="control").tolist()

    def iall_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Work:
        """Launch `all_reduce_`; `x` must be neither read nor written until the Work is done."""
        checks.reducible(self, x, op)
        if self.size == 1:
            return DoneWork()
        operation = self._collective(
            "all_reduce", kind, x.nbytes, "iall_reduce", op.value, x.dtype, x.shape
        )
        flat, copied = contiguous(x)
        work = self._iall_reduce(flat, op)
        return TrackedWork(_back_into(x, flat, work) if copied else work, operation, "iall_reduce")

    def all_gather(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array:
        """Join the ranks' shards along `dim` in rank order.

        `sizes[r]` is the length of rank r's shard (None: all like this one); 0 is legal.
        """
        dim = checks.dim(self, x, dim)
        shape = x.shape
        if sizes is not None:
            checks.sizes(self, "all_gather", sizes, x.shape[dim], own=True)
            shape = (*x.shape[:dim], tuple(sizes), *x.shape[dim + 1 :])
        if self.size == 1:
            return x
        sizes = [x.shape[dim]] * self.size if sizes is None else sizes
        counts = counts_along(x, dim, sizes)
        with self._collective(
            "all_gather", kind, sum(counts) * x.itemsize, "all_gather", x.dtype, shape, "dim", dim
        ):
            flat = self._all_gather(contiguous(x)[0], counts)
            return join(flat, x.shape, dim, sizes, counts)

    def reduce_scatter(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array:
        """Sum `x` over the ranks and return this rank's slice along `dim`.

        `x` has the same shape on every rank. `sizes[r]` is the length of rank r's slice (None:
        equal slices, and CommError if they do not divide the dim).
        """
        checks.reducible(self, x, SUM)
        dim = checks.dim(self, x, dim)
        if sizes is None:
            length, rest = divmod(x.shape[dim], self.size)
            if rest:
                raise CommError(
                    f"reduce_scatter on {self.name!r}: dim {dim} of shape {x.shape} is not "
                    f"divisible by {self.size} ranks; pass sizes="
                )
            sizes = [length] * self.size
        else:
            checks.sizes(self, "reduce_scatter", sizes, x.shape[dim], own=False)
        if self.size == 1:
            return x
        counts = counts_along(x, dim, sizes)
        with self._collective(
            "reduce_scatter", kind, x.nbytes, "reduce_scatter", x.dtype, x.shape, "dim", dim, sizes
        ):
            own = self._reduce_scatter(rank_major(x, dim, sizes), counts)
            return own.reshape(*x.shape[:dim], sizes[self.rank], *x.shape[dim + 1 :])

    def ireduce_scatter_(self, x: Array, sizes: Sequence[int], kind: str = "payload") -> Work:
        """Launch a sum over the ranks of which each keeps its slice of flat `x` [sum(sizes)].

        Afterwards the slice [sizes[rank]] of this rank holds the sum, in rank order; the rest of
        `x` is unchanged. `x` must be neither read nor written until the Work is done.
        """
        checks.reducible(self, x, SUM)
        checks.sizes(self, "ireduce_scatter", sizes, x.size, own=False)
        if self.size == 1:
            return DoneWork()
        operation = self._collective(
            "reduce_scatter", kind, x.nbytes, "ireduce_scatter", x.dtype, x.shape, sizes
        )
        return TrackedWork(self._ireduce_scatter(x, list(sizes)), operation, "ireduce_scatter")

    def iall_gather_(self, x: Array, sizes: Sequence[int], kind: str = "payload") -> Work:
        """Launch the completion of flat `x` [sum(sizes)], of which each rank holds its slice.

        `x` must be neither read nor written until the Work is done.
        """
        checks.sizes(self, "iall_gather", sizes, x.size, own=False)
        if self.size == 1:
            return DoneWork()
        operation = self._collective(
            "all_gather", kind, x.nbytes, "iall_gather", x.dtype, x.shape, sizes
        )
        return TrackedWork(self._iall_gather(x, list(sizes)), operation, "iall_gather")

    def all_to_all(
        self,
        parts: Sequence[Array],
        out_sizes: Sequence[int | tuple[int, ...]] | None = None,
        kind: str = "payload",
    ) -> list[Array]:
        """Send `parts[r]` to rank r and return what each rank sent here, in rank order.

        `out_sizes[r]` is the shape of what rank r sends here, or its number of rows (the other dims
        as in this rank's own part). None: the shapes of `parts`. Any part may be empty.
        """
        if len(parts) != self.size:
            raise CommError(
                f"all_to_all on {self.name!r} got {len(parts)} parts for {self.size} ranks"
            )
        own = parts[self.rank]
        if out_sizes is None:
            shapes = [part.shape for part in parts]
        else:
            shapes = [
                (entry, *own.shape[1:]) if isinstance(entry, (int, np.integer)) else tuple(entry)
                for entry in out_sizes
            ]
        if len(shapes) != self.size or any(part.dtype != own.dtype for part in parts):
            raise CommError(
                f"all_to_all on {self.name!r}: {len(shapes)} out_sizes, dtypes "
                f"{[dtype_name(p.dtype) for p in parts]}"
            )
        if math.prod(shapes[self.rank]) != own.size:
            raise CommError(
                f"all_to_all on {self.name!r}: own part has shape {own.shape} but out_sizes says "
                f"{shapes[self.rank]}"
            )
        if self.size == 1:
            return list(parts)
        num_bytes = sum(part.nbytes for part in parts)
        with self._collective("all_to_all", kind, num_bytes, "all_to_all", own.dtype):
            flats = self._all_to_all(
                [contiguous(part)[0] for part in parts], [math.prod(shape) for shape in shapes]
            )
            return [flat.reshape(shape) for flat, shape in zip(flats, shapes, strict=True)]

    def broadcast_(self, x: Array, root: int = 0, kind: str = "payload") -> Array:
        """Overwrite `x` (same shape and dtype on every rank) with the root's. Returns `x`."""
        checks.rank(self, root, "root")
        if self.size == 1:
            return x
        with self._collective(
            "broadcast", kind, x.nbytes, "broadcast", x.dtype, x.shape, "from", root
        ):
            flat, copied = contiguous(x)
            self._broadcast(flat, root)
            if copied and self.rank != root:
                x[...] = flat.reshape(x.shape)
        return x

    # ---- messages between two ranks

    def send(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> None:
        """Send `x` and return when it may be overwritten, at the latest when it is received."""
        checks.rank(self, dest, "dest", tag)
        with self._message("send", kind, x, "to rank", dest, tag):
            self._isend(contiguous(x)[0], dest, tag).wait()

    def isend(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> Work:
        """Launch `send`; `x` must not be written until the Work is done."""
        checks.rank(self, dest, "dest", tag)
        operation = self._message("send", kind, x, "to rank", dest, tag)
        return TrackedWork(self._isend(contiguous(x)[0], dest, tag), operation, "isend")

    def recv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Array:
        """Receive into `out` and return it. Messages of one tag arrive in order.

        Raises CommError unless `out` has exactly the sender's number of bytes.
        """
        checks.rank(self, source, "source", tag)
        with self._message("receive", kind, out, "from rank", source, tag):
            flat, copied = contiguous(out)
            self._irecv(flat, source, tag).wait()
            if copied:
                out[...] = flat.reshape(out.shape)
        return out

    def irecv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Work:
        """Launch `recv` into `out`, a fresh buffer: its contents are undefined until the end."""
        checks.rank(self, source, "source", tag)
        operation = self._message("receive", kind, out, "from rank", source, tag)
        flat, copied = contiguous(out)
        work = self._irecv(flat, source, tag)
        return TrackedWork(_back_into(out, flat, work) if copied else work, operation, "ireceive")

    def recv_any(self, out: Array, tag: int = 0, kind: str = "payload") -> int:
        """Receive into `out` from any rank that has sent with `tag`; return that rank."""
        checks.rank(self, 0, "source", tag)
        with self._message("receive", kind, out, "from rank", "any", tag):
            flat, copied = contiguous(out)
            source = self._recv_any(flat, tag)
            if copied:
                out[...] = flat.reshape(out.shape)
        return source

    def iprobe(self, tag: int = 0) -> int | None:
        """Return a rank whose message with `tag` waits to be received, None without one.

        Never blocks. Raises PeerFailed if another rank has ended.
        """
        checks.rank(self, 0, "source", tag)
        return self._iprobe(tag)

    def sendrecv(
        self, x: Array, dest: int, out: Array, source: int, tag: int = 0, kind: str = "payload"
    ) -> Array:
        """Send `x` to `dest` while receiving `out` from `source`; return `out`.

        This is the step of a ring. It cannot deadlock.
        """
        receive = self.irecv(out, source, tag, kind)
        send = self.isend(x, dest, tag, kind)
        receive.wait()
        send.wait()
        return out

    # ---- control

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self.size == 1:
            return
        with self._collective("barrier", "control", 0, "barrier"):
            self._barrier()

    def broadcast_json(self, obj: Any, root: int = 0) -> Any:
        """Return the root's `obj` on every rank, through JSON; `obj` is ignored elsewhere.

        Tuples become lists, on the root as well.
        """
        checks.rank(self, root, "root")
        if self.size == 1:
            return json.loads(json.dumps(obj))
        data = _encode(obj) if self.rank == root else np.empty(0, np.uint8)
        with self._collective(
            "broadcast_json", "control", 0, "broadcast_json", "from", root
        ) as operation:
            length = np.array([data.size], np.int64)
            self._broadcast(length, root)
            if self.rank != root:
                data = np.empty(int(length[0]), np.uint8)
            self._broadcast(data, root)
            operation.num_bytes = data.nbytes
        return _decode(data)

    def gather_json(self, obj: Any) -> list[Any]:
        """Return every rank's `obj` in rank order on every rank, through JSON."""
        if self.size == 1:
            return [json.loads(json.dumps(obj))]
        data = _encode(obj)
        with self._collective("gather_json", "control", 0, "gather_json") as operation:
            own_length = np.array([data.size], np.int64)
            lengths = [int(n) for n in self._all_gather(own_length, [1] * self.size)]
            joined = self._all_gather(data, lengths)
            operation.num_bytes = joined.nbytes
        return [_decode(part) for part in cut(joined, lengths)]

    def working(self, what: str) -> AbstractContextManager[None]:
        """Return the context of work that other ranks wait for, such as "reading data".

        Waits count from the last signal of a rank that is inside, about one a second: the work
        of a rank is no time-out of the others. Waits inside the block still have theirs. Not
        collective.
        """
        return nullcontext()

    # ---- groups and shared memory

    def split(
        self, color: int | None, key: int | None = None, name: str = ""
    ) -> Communicator | None:
        """Make a group of the ranks with the same `color`, ordered by (key, rank). Collective.

        Returns None where the color is None. `key` defaults to the rank, `name` to this name.
        """
        raise self._unsupported("split")

    def split_by_node(self) -> Communicator:
        """Make a group of the ranks that share memory with this one. Collective."""
        raise self._unsupported("split_by_node")

    def dup(self, name: str) -> Communicator:
        """Make a group of the same ranks under another name, with its own messages. Collective."""
        raise self._unsupported("dup")

    def alloc_shared(self, nbytes: int) -> SharedWindow:
        """Allocate `nbytes` of host memory per rank that every rank of the group addresses.

        Collective. Raises CommError if the ranks lie on several nodes.
        """
        raise self._unsupported("alloc_shared")

    # ---- checks and records

    def _ledger(self) -> Ledger:
        return ledger()

    def _collective(self, name: str, kind: str, num_bytes: int, *signature: Any) -> Operation:
        """Start the ledger entry of a collective; `signature` is what all ranks must agree on."""
        book = self._ledger()
        if book.check_order:
            checks.same_collective(self, signature)
        return Operation(book, self.name, self.size, name, kind, num_bytes, signature)

    def _message(
        self, name: str, kind: str, x: Array, direction: str, rank: int | str, tag: int
    ) -> Operation:
        signature = (name, direction, rank, "tag", tag)
        return Operation(self._ledger(), self.name, self.size, name, kind, x.nbytes, signature)


def _encode(obj: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(obj).encode(), np.uint8)


def _decode(data: np.ndarray) -> Any:
    return json.loads(data.tobytes())


def _back_into(x: Array, flat: Array, work: Work) -> Work:
    """Return `work`, which then copies the flat copy of `x` back into `x`."""

    def copy() -> None:
        x[...] = flat.reshape(x.shape)

    return ThenWork(work, flat, copy)
