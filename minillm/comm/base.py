"""The common half of every `Communicator`: arguments checked, arrays cut and joined along any dim,
everything written into the ledger.

An implementation supplies the operations on flat buffers (`_all_reduce` and its neighbours).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minillm.base.arrays import Array, dtype_name, is_narrow, namespace
from minillm.base.errors import CommError
from minillm.comm.communicator import MAX, MAX_TAG, MIN, SUM, ReduceOp, Work
from minillm.comm.ledger import OrderRecord, Recording, describe_difference, ledger
from minillm.comm.work import TrackedWork

_SIGNATURE_BYTES = 256


def reduce_in_order(parts: Sequence[Array], op: ReduceOp) -> Array:
    """Combine equal-shaped arrays one after another in rank order into a new array; 2-byte floats
    in float32 with one rounding at the end."""
    dtype = parts[0].dtype
    xp = namespace(parts[0])
    if is_narrow(dtype) and op is SUM:
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total += part.astype(np.float32)
        return total.astype(dtype)
    total = parts[0].copy()
    combine = {SUM: xp.add, MAX: xp.maximum, MIN: xp.minimum}[op]
    for part in parts[1:]:
        combine(total, part, out=total)
    return total


def _contiguous(x: Array) -> tuple[Array, bool]:
    """A flat C-ordered view of `x`, or a flat copy, and whether it is a copy."""
    if x.flags.c_contiguous:
        return x.reshape(-1), False
    return x.ravel(order="C"), True


class BaseCommunicator:
    """The whole `Communicator` interface over operations on flat contiguous buffers, which
    subclasses supply (`_all_reduce` and so on)."""

    def __init__(self, rank: int, size: int, name: str, timeout: float) -> None:
        self.rank, self.size, self.name = rank, size, name
        self.timeout = timeout
        self._order = OrderRecord()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, rank {self.rank} of {self.size})"

    @property
    def order(self) -> OrderRecord:
        """What collectives this rank has run here, see `ledger.check_order`."""
        return self._order

    # ---- collectives on arrays

    def all_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Array:
        """Replace `x` (same shape and dtype on every rank) by the sum, maximum or minimum over the
        ranks: the same bits on each. Returns `x`."""
        self._check_reducible(x, op)
        with self._collective(
            "all_reduce", kind, x.nbytes, f"all_reduce {op.value} {dtype_name(x.dtype)} {x.shape}"
        ):
            flat, copied = _contiguous(x)
            self._all_reduce(flat, op)
            if copied:
                x[...] = flat.reshape(x.shape)
        return x

    def reduce_numbers(self, numbers: Sequence[float], op: ReduceOp = SUM) -> list[float]:
        """`all_reduce_` of a few numbers for control, in float64."""
        return self.all_reduce_(np.array(numbers, np.float64), op, kind="control").tolist()

    def iall_reduce_(self, x: Array, op: ReduceOp = SUM, kind: str = "payload") -> Work:
        """Launch `all_reduce_`. `x` holds nothing meaningful and must be neither read nor written
        until the Work is done."""
        self._check_reducible(x, op)
        recording = self._collective(
            "all_reduce", kind, x.nbytes, f"iall_reduce {op.value} {dtype_name(x.dtype)} {x.shape}"
        )
        flat, copied = _contiguous(x)
        inner = self._iall_reduce(flat, op)
        return TrackedWork(
            inner, recording, "iall_reduce", self._copy_back(x, flat) if copied else None
        )

    def all_gather(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array:
        """Join the ranks' shards along `dim` in rank order. `sizes[r]` is the length of rank r's
        shard (None: all like this one); 0 is legal."""
        dim = self._check_dim(x, dim)
        if sizes is None:
            sizes, shape = [x.shape[dim]] * self.size, str(x.shape)
        else:
            self._check_sizes("all_gather", sizes, x.shape[dim], own=True)
            shape = str((*x.shape[:dim], tuple(sizes), *x.shape[dim + 1 :]))
        rest = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
        counts = [int(size) * rest for size in sizes]
        with self._collective(
            "all_gather",
            kind,
            sum(counts) * x.dtype.itemsize,
            f"all_gather {dtype_name(x.dtype)} {shape} along dim {dim}",
        ):
            flat = self._all_gather(_contiguous(x)[0], counts)
            return _join(flat, x.shape, dim, sizes, counts)

    def reduce_scatter(
        self, x: Array, dim: int = 0, sizes: Sequence[int] | None = None, kind: str = "payload"
    ) -> Array:
        """Sum `x` (same shape on every rank) over the ranks and return this rank's slice along
        `dim`.

        `sizes[r]` is the length of rank r's slice (None: equal slices, and CommError where they do
        not divide the dim).
        """
        self._check_reducible(x, SUM)
        dim = self._check_dim(x, dim)
        if sizes is None:
            length, rest = divmod(x.shape[dim], self.size)
            if rest:
                raise CommError(
                    f"reduce_scatter on {self.name!r}: dim {dim} of shape {x.shape} is not "
                    f"divisible by {self.size} ranks; pass sizes="
                )
            sizes = [length] * self.size
        else:
            self._check_sizes("reduce_scatter", sizes, x.shape[dim], own=False)
        signature = (
            f"reduce_scatter {dtype_name(x.dtype)} {x.shape} along dim {dim} in sizes {list(sizes)}"
        )
        rest = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
        counts = [int(size) * rest for size in sizes]
        with self._collective("reduce_scatter", kind, x.nbytes, signature):
            own = self._reduce_scatter(_rank_major(x, dim, sizes), counts)
            return own.reshape(*x.shape[:dim], sizes[self.rank], *x.shape[dim + 1 :])

    def all_to_all(
        self,
        parts: Sequence[Array],
        out_sizes: Sequence[int | tuple[int, ...]] | None = None,
        kind: str = "payload",
    ) -> list[Array]:
        """Send `parts[r]` to rank r and return what each rank sent here, in rank order.

        `out_sizes[r]` is the shape of what rank r sends here, or its number of rows (the other dims
        as in this rank's own part); None: the shapes of `parts`. Any of them may be empty.
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
        num_bytes = sum(part.nbytes for part in parts)
        with self._collective("all_to_all", kind, num_bytes, f"all_to_all {dtype_name(own.dtype)}"):
            flats = self._all_to_all(
                [_contiguous(part)[0] for part in parts], [math.prod(shape) for shape in shapes]
            )
            return [flat.reshape(shape) for flat, shape in zip(flats, shapes, strict=True)]

    def broadcast_(self, x: Array, root: int = 0, kind: str = "payload") -> Array:
        """Overwrite `x` (same shape and dtype on every rank) by the root's. Returns `x`."""
        self._check_rank(root, "root")
        with self._collective(
            "broadcast", kind, x.nbytes, f"broadcast {dtype_name(x.dtype)} {x.shape} from {root}"
        ):
            flat, copied = _contiguous(x)
            self._broadcast(flat, root)
            if copied and self.rank != root:
                x[...] = flat.reshape(x.shape)
        return x

    # ---- messages between two ranks

    def send(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> None:
        """Send `x`; returns when it may be overwritten, which may be only after the receiver has
        arrived."""
        self._check_rank(dest, "dest", tag)
        with self._message("send", kind, x, f"to rank {dest} tag {tag}"):
            self._isend(_contiguous(x)[0], dest, tag).wait()

    def isend(self, x: Array, dest: int, tag: int = 0, kind: str = "payload") -> Work:
        """Launch `send`; `x` must not be written until the Work is done."""
        self._check_rank(dest, "dest", tag)
        recording = self._message("send", kind, x, f"to rank {dest} tag {tag}")
        return TrackedWork(self._isend(_contiguous(x)[0], dest, tag), recording, "isend", None)

    def recv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Array:
        """Receive into `out`, which must have exactly the sender's number of bytes (else
        CommError). Messages of one tag arrive in order."""
        self._check_rank(source, "source", tag)
        with self._message("receive", kind, out, f"from rank {source} tag {tag}"):
            flat, copied = _contiguous(out)
            self._irecv(flat, source, tag).wait()
            if copied:
                out[...] = flat.reshape(out.shape)
        return out

    def irecv(self, out: Array, source: int, tag: int = 0, kind: str = "payload") -> Work:
        """Launch `recv` into `out`: a FRESH buffer, since its contents are lost from here on and
        undefined until the Work is done."""
        self._check_rank(source, "source", tag)
        recording = self._message("receive", kind, out, f"from rank {source} tag {tag}")
        flat, copied = _contiguous(out)
        return TrackedWork(
            self._irecv(flat, source, tag),
            recording,
            "ireceive",
            self._copy_back(out, flat) if copied else None,
        )

    def recv_any(self, out: Array, tag: int = 0, kind: str = "payload") -> int:
        """Receive into `out` from whichever rank has sent with `tag`; returns that rank."""
        self._check_rank(0, "source", tag)
        with self._message("receive", kind, out, f"from any rank tag {tag}"):
            flat, copied = _contiguous(out)
            source = self._recv_any(flat, tag)
            if copied:
                out[...] = flat.reshape(out.shape)
        return source

    def sendrecv(
        self, x: Array, dest: int, out: Array, source: int, tag: int = 0, kind: str = "payload"
    ) -> Array:
        """Send `x` to `dest` while receiving `out` from `source`: the step of a ring, which cannot
        deadlock. Returns `out`."""
        receive = self.irecv(out, source, tag, kind)
        send = self.isend(x, dest, tag, kind)
        receive.wait()
        send.wait()
        return out

    # ---- control

    def barrier(self) -> None:
        """Return once every rank has called it."""
        with self._collective("barrier", "control", 0, "barrier"):
            self._barrier()

    def broadcast_json(self, obj: Any, root: int = 0) -> Any:
        """The root's `obj` on every rank, through JSON (so tuples arrive as lists on the root too).
        `obj` is ignored elsewhere."""
        self._check_rank(root, "root")
        data = _encode(obj) if self.rank == root else np.empty(0, np.uint8)
        recording = self._collective("broadcast_json", "control", 0, f"broadcast_json from {root}")
        with recording:
            length = np.array([data.size], np.int64)
            self._broadcast(length, root)
            if self.rank != root:
                data = np.empty(int(length[0]), np.uint8)
            self._broadcast(data, root)
            recording.num_bytes = data.nbytes
        return json.loads(data.tobytes())

    def gather_json(self, obj: Any) -> list[Any]:
        """Every rank's `obj` in rank order on every rank, through JSON."""
        data = _encode(obj)
        recording = self._collective("gather_json", "control", 0, "gather_json")
        with recording:
            lengths = [
                int(n) for n in self._all_gather(np.array([data.size], np.int64), [1] * self.size)
            ]
            joined = self._all_gather(data, lengths)
            recording.num_bytes = joined.nbytes
        ends = np.cumsum(lengths)
        return [
            json.loads(joined[end - n : end].tobytes())
            for end, n in zip(ends, lengths, strict=True)
        ]

    # ---- what subclasses supply: flat, C-contiguous, 1-D buffers; counts are in elements

    def _all_reduce(self, flat: Array, op: ReduceOp) -> None:
        raise self._unsupported("all_reduce")

    def _iall_reduce(self, flat: Array, op: ReduceOp) -> Work:
        raise self._unsupported("iall_reduce")

    def _all_gather(self, flat: Array, counts: list[int]) -> Array:
        raise self._unsupported("all_gather")

    def _gather_into(self, out: Array, counts: list[int]) -> None:
        raise self._unsupported("all_gather")

    def _reduce_scatter(self, flat: Array, counts: list[int]) -> Array:
        raise self._unsupported("reduce_scatter")

    def _all_to_all(self, parts: list[Array], counts: list[int]) -> list[Array]:
        raise self._unsupported("all_to_all")

    def _broadcast(self, flat: Array, root: int) -> None:
        raise self._unsupported("broadcast")

    def _isend(self, flat: Array, dest: int, tag: int) -> Work:
        raise self._unsupported("send")

    def _irecv(self, flat: Array, source: int, tag: int) -> Work:
        raise self._unsupported("receive")

    def _recv_any(self, flat: Array, tag: int) -> int:
        raise self._unsupported("recv_any")

    def _barrier(self) -> None:
        raise self._unsupported("barrier")

    # ---- checks and records

    def _unsupported(self, operation: str) -> CommError:
        return CommError(f"{type(self).__name__} has no {operation}")

    def _collective(self, name: str, kind: str, num_bytes: int, signature: str) -> Recording:
        """Note a collective in the order record and start its ledger entry."""
        book = ledger()
        self._order.add(signature)
        self._signature = signature
        if book.check_order:
            self._compare(signature)
        return Recording(book, self.name, name, kind, num_bytes, self.size, f"{signature}, ")

    def _message(self, name: str, kind: str, x: Array, detail: str) -> Recording:
        return Recording(ledger(), self.name, name, kind, x.nbytes, self.size, f"{detail}, ")

    def _compare(self, signature: str) -> None:
        """Exchange signatures before the collective itself, so that a mismatch is an error and not
        a deadlock."""
        text = signature.encode()[:_SIGNATURE_BYTES]
        own = np.zeros(_SIGNATURE_BYTES, np.uint8)
        own[: len(text)] = np.frombuffer(text, np.uint8)
        table = self._all_gather(own, [_SIGNATURE_BYTES] * self.size).reshape(
            self.size, _SIGNATURE_BYTES
        )
        seen: dict[str, list[int]] = {}
        for rank in range(self.size):
            seen.setdefault(
                table[rank].tobytes().rstrip(b"\0").decode(errors="replace"), []
            ).append(rank)
        if len(seen) > 1:
            raise CommError(
                f"ranks of {self.name!r} ran different collectives: "
                f"{describe_difference(self._order.count - 1, seen)}"
            )

    def _copy_back(self, x: Array, flat: Array) -> Callable[[], None]:
        def copy() -> None:
            x[...] = flat.reshape(x.shape)

        return copy

    def _check_reducible(self, x: Array, op: ReduceOp) -> None:
        if x.dtype.kind == "b" and op is SUM:
            raise CommError(
                f"a sum of bool arrays on {self.name!r} has no meaning; convert to an integer, or "
                "use MAX (any) or MIN (all)"
            )

    def _check_dim(self, x: Array, dim: int) -> int:
        if not -x.ndim <= dim < x.ndim:
            raise CommError(f"dim {dim} does not exist in shape {x.shape} (on {self.name!r})")
        return dim % x.ndim

    def _check_sizes(self, operation: str, sizes: Sequence[int], length: int, own: bool) -> None:
        if len(sizes) != self.size or min(sizes) < 0:
            raise CommError(
                f"{operation} on {self.name!r}: sizes {list(sizes)} must be {self.size} numbers >= "
                "0"
            )
        expected = sizes[self.rank] if own else sum(sizes)
        if expected != length:
            what = f"sizes[{self.rank}]" if own else "the sum of sizes"
            raise CommError(
                f"{operation} on {self.name!r}: {what} of {list(sizes)} is {expected}, but the "
                f"array has {length}"
            )

    def _check_rank(self, rank: int, what: str, tag: int = 0) -> None:
        if not 0 <= rank < self.size:
            raise CommError(
                f"{what}={rank} is not a rank of {self.name!r}, which has ranks 0 to "
                f"{self.size - 1}"
            )
        if not 0 <= tag <= MAX_TAG:
            raise CommError(f"tag {tag} on {self.name!r} is outside 0 to {MAX_TAG}")


def _encode(obj: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(obj).encode(), np.uint8)


def _join(
    flat: Array, shape: tuple[int, ...], dim: int, sizes: Sequence[int], counts: list[int]
) -> Array:
    """Blocks that lie one after another, joined along `dim`: a reshape where nothing stands before
    that dim, else one copy."""
    before, after = shape[:dim], shape[dim + 1 :]
    if math.prod(before) == 1:
        return flat.reshape(*before, sum(sizes), *after)
    out = namespace(flat).empty((*before, sum(sizes), *after), flat.dtype)
    start = element = 0
    for size, count in zip(sizes, counts, strict=True):
        index = (*(slice(None),) * dim, slice(start, start + size))
        out[index] = flat[element : element + count].reshape(*before, size, *after)
        start, element = start + size, element + count
    return out


def _rank_major(x: Array, dim: int, sizes: Sequence[int]) -> Array:
    """The inverse of `_join`: the slices of `x` along `dim`, one after another in a flat array (a
    view where they lie so already)."""
    if math.prod(x.shape[:dim]) == 1:
        return _contiguous(x)[0]
    flat = namespace(x).empty(x.size, x.dtype)
    start = element = 0
    for size in sizes:
        part = x[(*(slice(None),) * dim, slice(start, start + size))]
        flat[element : element + part.size].reshape(part.shape)[...] = part
        start, element = start + size, element + part.size
    return flat
