"""Recurrent layers: a cell unrolled over a window, with one product over the window for its inputs.

Inside, arrays are time-major, so that a step's rows lie together:

    gates [T, B, G] = x W_in^T + b            one product
    gates[t] += h[t - 1] W_rec^T              one product a step, then the cell's pointwise part

Backward walks the steps in reverse; the gradients of both weights and of x are one product each.
With tensor parallelism a rank computes its units. Each step all-gathers h forward, and
reduce-scatters its gradient backward.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from minillm import kernels
from minillm.autograd.slot import fresh_of
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace
from minillm.comm.communicator import Communicator
from minillm.ops.linear import product_into, sums_of

PIECE = 64  # steps at once without a tape: a product over a batch of 1 has rows enough


class Cell(Protocol):
    """Recurrent cell: its pointwise part, and the steps of a window. The first state is h."""

    num_gates: ClassVar[int]
    num_states: ClassVar[int]

    @staticmethod
    def forward(gates: Array, before: Array, after: Array) -> None:
        """Fill `after` [S, B, H] from pre-activations [B, G] and the states `before` [S, B, H].

        Overwrites `gates` by what backward needs.
        """

    @staticmethod
    def backward(gates: Array, before: Array, after: Array, grad_h: Array, grads: Array) -> None:
        """Overwrite `gates` by the gradient of the pre-activations.

        `grad_h` [B, H] is the gradient of the output. `grads` [S - 1, B, H], those of the other
        states, become those of the states before.
        """

    @classmethod
    def forward_window(
        cls, gates: Array, w_rec: Array, states: Array, whole: Array, comm: Communicator
    ) -> None:
        """Run the steps: fill the states [S, T + 1, B, H_local] and the h of all ranks, `whole`.

        gates: [T, B, G_local], the inputs' part of the pre-activations; overwritten as by
        `forward`. whole: [T + 1, B, H]. The first of the states and of `whole` are read.
        """
        weights = kernels.packed(w_rec.T, gates.shape[1])
        for t in range(len(gates)):
            kernels.matmul(whole[t], weights, out=gates[t], accumulate=True)
            cls.forward(gates[t], states[:, t], states[:, t + 1])
            if comm.size > 1:
                whole[t + 1] = comm.all_gather(states[0, t + 1], 1)

    @classmethod
    def backward_window(
        cls, gates: Array, w_rec: Array, states: Array, grad_h: Array, comm: Communicator
    ) -> None:
        """Overwrite gates by the gradients of the pre-activations.

        grad_h: [T, B, H_local], to which what comes through later steps is added.
        """
        grads = namespace(gates).zeros((len(states) - 1, *states.shape[2:]), gates.dtype)
        weights = kernels.packed(w_rec, gates.shape[1])
        for t in reversed(range(len(gates))):
            cls.backward(gates[t], states[:, t], states[:, t + 1], grad_h[t], grads)
            if t and comm.size == 1:
                kernels.matmul(gates[t], weights, out=grad_h[t - 1], accumulate=True)
            elif t:
                grad_h[t - 1] += comm.reduce_scatter(kernels.matmul(gates[t], weights), 1)


class LSTM(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    Gates are [input | forget | candidate | output], states h and c, as in torch.nn.LSTM.
    """

    num_gates, num_states = 4, 2

    @staticmethod
    def forward(gates: Array, before: Array, after: Array) -> None:
        kernels.lstm_forward_(gates, before[1], after[1], after[0])

    @staticmethod
    def backward(gates: Array, before: Array, after: Array, grad_h: Array, grads: Array) -> None:
        kernels.lstm_backward_(gates, before[1], after[1], grad_h, grads[0])

    @classmethod
    def forward_window(
        cls, gates: Array, w_rec: Array, states: Array, whole: Array, comm: Communicator
    ) -> None:
        if comm.size > 1:
            super().forward_window(gates, w_rec, states, whole, comm)
        else:  # one call: a call from Python for each product and cell takes 3 % of a step
            kernels.lstm_window_forward_(gates, w_rec, states)

    @classmethod
    def backward_window(
        cls, gates: Array, w_rec: Array, states: Array, grad_h: Array, comm: Communicator
    ) -> None:
        if comm.size > 1:
            super().backward_window(gates, w_rec, states, grad_h, comm)
        else:
            grad_c = namespace(gates).zeros(states.shape[2:], gates.dtype)
            kernels.lstm_window_backward_(gates, w_rec, states, grad_h, grad_c)


class RNN(Cell):
    """Plain recurrent cell, h = tanh of the pre-activations (Elman 1990), as in torch.nn.RNN."""

    num_gates, num_states = 1, 1

    @staticmethod
    def forward(gates: Array, before: Array, after: Array) -> None:
        namespace(gates).tanh(gates, out=after[0])

    @staticmethod
    def backward(gates: Array, before: Array, after: Array, grad_h: Array, grads: Array) -> None:
        gates[...] = grad_h * (1 - after[0] * after[0])


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "rnn": RNN}


def recurrent(
    x: Tensor,
    w_in: Any,
    w_rec: Any,
    bias: Any,
    *,
    cell: type[Cell],
    first: Array,
    last: Array | None,
    comm: Communicator,
    recompute: bool = False,
) -> Tensor:
    """Unroll a cell over x [B, T, D] inside the region: h [B, T, H], whole on every rank.

    w_in: [G_local, D]; w_rec: [G_local, H]; bias: [G_local].
    first: [S, B, H_local], the states before the window. No gradient goes back into them: that
    is truncated back-propagation through time (Williams and Peng 1990).
    last: [S, B, H_local] or None, takes the states behind the window.
    recompute: the tape keeps x and `first` alone, and backward runs the window again.
    Collective over `comm`, once a step each way.
    """
    return _Recurrent.apply(
        x, w_in, w_rec, bias, cell=cell, first=first, last=last, comm=comm, recompute=recompute
    )


class _Recurrent(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Array,
        w_in: Array,
        w_rec: Array,
        bias: Array,
        *,
        cell: type[Cell],
        first: Array,
        last: Array | None,
        comm: Communicator,
        recompute: bool,
    ) -> Array:
        # Without a tape the gates of a long window never exist at once.
        size = x.shape[1] if ctx.recording else PIECE
        state, parts = first, []
        for start in range(0, x.shape[1], size):
            steps = _turned(x[:, start : start + size])
            gates, states, h = _unrolled(steps, w_in, w_rec, bias, cell, state, comm)
            state = states[:, -1]
            parts.append(_turned(h[1:]))
        kept = (None, None, None) if recompute else (gates, states, h)
        inputs = (steps, ctx.input(1), ctx.input(2), ctx.input(3))
        ctx.save(*inputs, cell, first.copy() if recompute else None, comm, *kept)
        if last is not None:
            last[...] = state
        return parts[0] if len(parts) == 1 else namespace(x).concatenate(parts, 1)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, ...]:
        x, w_in, w_rec, bias, cell, first, comm, gates, states, h = ctx.saved
        if gates is None:
            gates, states, h = _unrolled(x, w_in, w_rec, bias, cell, first, comm)
        H = states.shape[-1]
        own = slice(comm.rank * H, (comm.rank + 1) * H)
        grad_h = _turned(grad_outs[0][:, :, own])  # a copy: the steps add to it
        cell.backward_window(gates, w_rec, states, grad_h, comm)
        flat = gates.reshape(-1, gates.shape[-1])
        of_x = of_in = of_rec = sums = None
        if needs[1]:
            sums = sums_of(flat, into[3]) if needs[3] else None
            of_in = product_into(into[1], flat.T, x.reshape(len(flat), -1), sums)
        elif needs[3]:
            sums = kernels.column_sum(flat, fresh_of(into[3]))
        if needs[2]:
            of_rec = product_into(into[2], flat.T, h[:-1].reshape(len(flat), -1), None)
        if needs[0]:
            of_x = _turned(kernels.matmul(flat, w_in).reshape(x.shape))
        return of_x, of_in, of_rec, sums


def _unrolled(
    x: Array, w_in: Array, w_rec: Array, bias: Array, cell: type[Cell], first: Array, comm: Any
) -> tuple[Array, Array, Array]:
    """Return gates [T, B, G_local] for backward, states [S, T + 1, B, H_local] and h whole.

    x: [T, B, D]; first: [S, B, H_local]. h: [T + 1, B, H], the first states on one rank.
    """
    (T, B, D), xp = x.shape, namespace(x)
    gates = kernels.matmul(x.reshape(T * B, D), w_in.T, bias=bias).reshape(T, B, len(w_in))
    states = xp.empty((len(first), T + 1, *first.shape[1:]), x.dtype)
    states[:, 0] = first
    whole = states[0]
    if comm.size > 1:
        whole = xp.empty((T + 1, B, w_rec.shape[1]), x.dtype)
        whole[0] = comm.all_gather(states[0, 0], 1)
    cell.forward_window(gates, w_rec, states, whole, comm)
    return gates, states, whole


def _turned(x: Array) -> Array:
    """Return a C-contiguous copy with the first two dims exchanged: [B, T, D] as [T, B, D]."""
    return namespace(x).array(x.transpose(1, 0, 2), order="C")
