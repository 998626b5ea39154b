"""The mesh: coordinates and groups. Thread ranks: failures and deadlocks end."""

from __future__ import annotations

import time

import numpy as np
import pytest

from minillm.base.errors import CommTimeout, ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import AXES, MeshShape

SHAPE = MeshShape(pp=2, dp=2, tp=2)


def test_coordinates_and_ranks_are_inverse_and_tp_ranks_are_neighbours() -> None:
    assert [SHAPE.rank(SHAPE.coords(rank)) for rank in range(8)] == list(range(8))
    assert SHAPE.coords(1) == dict.fromkeys(AXES, 0) | {"tp": 1} and SHAPE.coords(4)["pp"] == 1
    with pytest.raises(ConfigError, match="rank 8"):
        SHAPE.coords(8)
    with pytest.raises(ConfigError, match="axis tp has size 0"):
        MeshShape(tp=0)


def test_groups_hold_the_ranks_that_differ_in_their_axes_only() -> None:
    def members(comm: Communicator) -> dict[str, list[int]]:
        mesh = Mesh(comm, SHAPE, {"shared": (0, 1)})
        groups = {axis: mesh.axis(axis) for axis in ("pp", "dp", "tp")} | {
            "tie": mesh.tie("shared")
        }
        return {name: group.gather_json(comm.rank) for name, group in groups.items()}

    assert run_ranks(8, members)[5] == {"pp": [1, 5], "dp": [5, 7], "tp": [4, 5], "tie": [1, 5]}


def test_a_mesh_of_another_size_and_an_undeclared_group_are_refused() -> None:
    def rank(comm: Communicator) -> None:
        with pytest.raises(ConfigError, match="has 8 ranks, but 2 are running"):
            Mesh(comm, SHAPE)
        with pytest.raises(ConfigError, match=r"no communicator over pp\+dp; declared groups: "):
            Mesh(comm, MeshShape(pp=2)).axis("pp", "dp")

    run_ranks(2, rank)


def test_one_failing_rank_ends_the_others_that_wait_for_it() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            raise ValueError("the cause")
        comm.all_reduce_(np.zeros(3))

    started = time.monotonic()
    with pytest.raises(ValueError, match="the cause"):
        run_ranks(3, rank)
    assert time.monotonic() - started < 10


def test_two_blocking_sends_that_cross_deadlock_visibly_with_rendezvous() -> None:
    def rank(comm: Communicator) -> None:
        comm.send(np.zeros(3), 1 - comm.rank, 0)
        comm.recv(np.zeros(3), 1 - comm.rank, 0)

    message = (
        "rank 0 waits for rank 1 of 'world' to receive tag 0; "
        "rank 1 waits for rank 0 of 'world' to receive tag 0"
    )
    with pytest.raises(CommTimeout, match=message):
        run_ranks(2, rank, rendezvous=True, timeout=1.0)


def test_the_work_of_one_rank_is_no_time_out_of_the_others() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 0:
            with comm.working("reading"):
                time.sleep(0.8)
        comm.barrier()

    run_ranks(3, rank, timeout=0.3)


def test_a_rank_that_works_and_waits_itself_times_out() -> None:
    def rank(comm: Communicator) -> None:
        with comm.working("reading"):
            if comm.rank:
                comm.barrier()

    with pytest.raises(CommTimeout, match="rank 1 waits for operation 0"):
        run_ranks(2, rank, timeout=0.3)
