"""Differentiable collectives: each is the adjoint of its partner, <u, J v> = <J^T u, v>.

The products are summed over the ranks, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from minillm.autograd.backward import backward
from minillm.autograd.tape import Tensor
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.parallel import collectives as c

# name -> (function of (x, comm), layout in, layout out, local shape in as a function of n). R: one
# copy; S: shards; P: addends of one sum.
CASES: dict[str, tuple[Callable, str, str, Callable[[int], tuple[int, ...]]]] = {
    "copy_to": (lambda x, comm: c.copy_to(x, comm), "R", "P", lambda n: (3, 5)),
    "reduce_from": (lambda x, comm: c.reduce_from(x, comm), "P", "R", lambda n: (3, 5)),
    "all_gather": (lambda x, comm: c.all_gather(x, comm, 1), "S", "P", lambda n: (2, 3, 4)),
    "reduce_scatter": (
        lambda x, comm: c.reduce_scatter(x, comm, 1),
        "P",
        "S",
        lambda n: (2, 3 * n, 4),
    ),
    "gather_from": (lambda x, comm: c.gather_from(x, comm, 2), "S", "R", lambda n: (2, 3, 4)),
    "scatter_to": (lambda x, comm: c.scatter_to(x, comm, 0), "R", "S", lambda n: (2 * n, 3)),
    "all_to_all": (lambda x, comm: c.all_to_all(x, comm, 1, 2), "S", "S", lambda n: (2, 2 * n, 3)),
}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_adjoint(name: str, n: int) -> None:
    """Compare <u, J v> with <J^T u, v>, summed over all ranks.

    The inner product of a replicated value counts once. A gradient has the dual layout of its
    value.
    """
    function, layout_in, layout_out, shape = CASES[name]

    def rank(comm) -> tuple[float, float]:
        def draw(seed: int, size: tuple[int, ...], same: bool) -> np.ndarray:
            return np.random.default_rng([seed, 0 if same else comm.rank + 1]).standard_normal(size)

        v = draw(1, shape(n), same=layout_in == "R")
        x = Tensor(v.copy(), True)
        y = function(x, comm)
        # "P" out (copy_to, all_gather): the value is replicated, each rank continues on its own, so
        # every rank has its own cotangent.
        u = draw(2, y.shape, same=layout_out == "R")
        forward = float(np.vdot(u, y.data)) * (1 / n if layout_out == "R" else 1)
        backward([(y, u)])
        back = float(np.vdot(x.grad, v)) * (1 / n if layout_in == "R" else 1)
        return forward, back

    results = run_ranks(n, rank)
    pushed, pulled = (sum(r[i] for r in results) for i in range(2))
    assert abs(pushed - pulled) <= 1e-12 * max(1, abs(pushed)), (pushed, pulled)


@pytest.mark.parametrize("name", list(CASES))
def test_one_rank_adds_no_node(name: str) -> None:
    function, _, _, shape = CASES[name]
    x = Tensor(np.ones(shape(1)), True)
    assert function(x, SelfCommunicator()) is x
