"""Tensor parallelism: each matrix product cut over the ranks of the `tp` axis.

    x --enter--> [column-parallel] -> own heads / own features -> [row-parallel] --leave--> y
      copy_to     W_qkv, W_up: rows       no communication          W_out, W_down:    reduce_from
                  of the weight cut                                 columns cut

Source: Shoeybi et al. 2019, arXiv:1909.08053. A pair of products costs one all-reduce forward
(leaving) and one backward (entering). The layers are in nn/. A layer only knows its region: with
sequence parallelism (sequence.py) the same layers enter and leave by other collectives.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

from minillm.autograd.tape import Tensor
from minillm.comm.communicator import Communicator
from minillm.parallel.collectives import copy_to, reduce_from
from minillm.params.where import Pass


class Group(Protocol):
    """Place of a rank among the tensor-parallel ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class PlannedGroup(NamedTuple):
    """Group of a model that is planned but never run: it has no communicator."""

    rank: int = 0
    size: int = 1


class Region(Protocol):
    """Tensor-parallel part of a model, and the layout of the activations outside it."""

    comm: Communicator
    partial_over: tuple[str, ...]  # axes over which gradients of parameters outside are partial

    def outside(self, pass_: Pass) -> Pass:
        """Return the pass of this rank's arrays outside the region, from that of whole sequences.

        Raises ConfigError if the sequences cannot be cut.
        """

    def enter(self, x: Tensor, pass_: Pass) -> Tensor:
        """Turn x outside the region into the input of a column-parallel product."""

    def leave(self, x: Tensor, pass_: Pass) -> Tensor:
        """Sum the partial sums of a row-parallel product, in the layout outside the region."""


class TensorParallel:
    """Region whose surroundings are replicated over tp."""

    partial_over: tuple[str, ...] = ()

    def __init__(self, comm: Group) -> None:
        self.comm = cast(Communicator, comm)  # planning needs no more than a Group

    def outside(self, pass_: Pass) -> Pass:
        """Return `pass_`: every rank holds all time steps."""
        return pass_

    def enter(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return x [B, T, D]; its gradient is all-reduced."""
        return x if self.comm.size == 1 else copy_to(x, self.comm)

    def leave(self, x: Tensor, pass_: Pass) -> Tensor:
        """All-reduce partial sums x [B, T, D] in place."""
        return x if self.comm.size == 1 else reduce_from(x, self.comm)
