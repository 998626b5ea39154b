"""A group of one rank returns its input and records nothing, and delivers messages to itself."""

from __future__ import annotations

import numpy as np
import pytest

from minillm.base.errors import CommError
from minillm.comm.communicator import MAX
from minillm.comm.ledger import recording
from minillm.comm.single import SelfCommunicator

X = np.arange(6.0).reshape(2, 3)


def test_collectives_return_their_input_and_record_nothing() -> None:
    comm = SelfCommunicator()
    with recording() as ledger:
        assert comm.all_reduce_(X) is X and comm.broadcast_(X) is X
        assert comm.all_gather(X, 1) is X and comm.reduce_scatter(X, -1, [3]) is X
        assert comm.all_to_all([X])[0] is X
        assert comm.iall_reduce_(X, MAX).test()
        comm.barrier()
        assert comm.reduce_numbers([1.5, 2]) == [1.5, 2]
        assert comm.broadcast_json((1, "a")) == [1, "a"]
        assert comm.gather_json({"a": None}) == [{"a": None}]
        comm.send(X, 0)
        comm.recv(np.empty_like(X), 0)
    assert not ledger.rows and not ledger.operations


def test_arguments_are_checked_as_in_any_group() -> None:
    comm = SelfCommunicator("tp")
    for call, message in (
        (lambda: comm.all_gather(X, 2), "dim 2 does not exist"),
        (lambda: comm.all_gather(X, 0, [3]), r"sizes\[0\] of \[3\] is 3, but the array has 2"),
        (lambda: comm.reduce_scatter(X, 0, [1, 1]), "must be 1 numbers"),
        (lambda: comm.all_reduce_(X > 0), "bool arrays on 'tp'"),
        (lambda: comm.all_to_all([X, X]), "2 parts for 1 rank"),
        (lambda: comm.broadcast_(X, 1), "root=1 is not a rank of 'tp'"),
        (lambda: comm.send(X, 0, 40_000), "tag 40000 on 'tp' is outside"),
    ):
        with pytest.raises(CommError, match=message):
            call()


def test_messages_to_itself_arrive_in_order() -> None:
    comm = SelfCommunicator()
    first, second = X.copy(), X + 10
    comm.send(first, 0, 4)
    first[...] = -1  # after a send the array may be overwritten
    comm.isend(second, 0, 4).wait()
    assert np.array_equal(comm.recv(np.empty_like(X), 0, 4), X)
    assert comm.recv_any(out := np.empty_like(X), 4) == 0 and np.array_equal(out, second)
    early = comm.irecv(out := np.empty_like(X), 0, 5)
    assert not early.test()
    comm.send(X, 0, 5)
    assert early.test() and np.array_equal(out, X)
    assert np.array_equal(comm.sendrecv(X, 0, np.empty_like(X), 0), X)


def test_a_receive_that_could_never_end_is_an_error() -> None:
    comm = SelfCommunicator()
    with pytest.raises(CommError, match=r"receive of tag 3 .* would never end; send first"):
        comm.recv(np.empty(2), 0, 3)
    comm.send(np.zeros(2), 0)
    with pytest.raises(CommError, match="16 bytes does not fit the receive of 24 bytes"):
        comm.recv(np.empty(3), 0)
