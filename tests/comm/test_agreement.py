"""Agreement: ranks succeed together or raise the same error together."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from minillm.base.errors import CheckpointError, ConfigError, MinillmError, PeerFailed
from minillm.comm.agreement import AgreedError, agree, from_first, gather, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks


def failing_on(comm: Communicator, *ranks: int) -> Callable[[], int]:
    """Return a function that gives the rank, or raises ConfigError on `ranks`."""

    def fn() -> int:
        if comm.rank in ranks:
            raise ConfigError(f"option {comm.rank} is wrong")
        return comm.rank

    return fn


def errors(n: int, fn: Callable[[Communicator], Any]) -> list[tuple[type, str]]:
    """Return the class and the message of the error that `fn` raises on each of `n` ranks."""

    def rank(comm: Communicator) -> tuple[type, str]:
        with pytest.raises(MinillmError) as caught:
            fn(comm)
        return type(caught.value), str(caught.value)

    return run_ranks(n, rank)


def test_values_without_an_error() -> None:
    assert run_ranks(3, lambda comm: agree(comm, failing_on(comm))) == [0, 1, 2]
    assert run_ranks(3, lambda comm: gather(comm, failing_on(comm))) == [[0, 1, 2]] * 3
    assert run_ranks(3, lambda comm: from_first(comm, failing_on(comm, 1, 2))) == [0] * 3


@pytest.mark.parametrize("function", [agree, gather])
def test_the_lowest_failing_rank_speaks_for_all(function: Callable) -> None:
    one = errors(3, lambda comm: function(comm, failing_on(comm, 2)))
    assert one == [(AgreedError, "rank 2: option 2 is wrong")] * 3
    two = errors(4, lambda comm: function(comm, failing_on(comm, 1, 3), CheckpointError))
    assert two == [(CheckpointError, "rank 1 (and 1 more ranks): option 1 is wrong")] * 4


def test_an_error_that_all_ranks_have_names_no_rank() -> None:
    def missing() -> None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "corpus.txt")

    found = errors(2, lambda comm: agree(comm, missing))
    assert found == [(AgreedError, "No such file or directory: corpus.txt")] * 2
    assert errors(1, lambda comm: agree(comm, missing)) == found[:1]


def test_an_error_of_the_first_rank_is_broadcast() -> None:
    found = errors(3, lambda comm: from_first(comm, failing_on(comm, 0), ConfigError))
    assert found == [(ConfigError, "option 0 is wrong")] * 3


def test_a_bug_is_not_agreed_on() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            agree(comm, lambda: {}["no such key"])
        with pytest.raises(PeerFailed, match="rank 1 has failed"):
            agree(comm, lambda: None)

    with pytest.raises(KeyError, match="no such key"):
        run_ranks(2, rank)


def test_an_error_known_to_all_becomes_an_agreed_one() -> None:
    with pytest.raises(AgreedError, match=r"^too short$"), known_to_all():
        raise ConfigError("too short")
    with pytest.raises(KeyError), known_to_all():
        raise KeyError("a bug stays what it is")
