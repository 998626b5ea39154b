"""Agreement: ranks that succeed together or raise the same error together.

An error of one rank would leave the others waiting in their next collective. Whatever can fail
before or between steps (options, files, memory) therefore runs through a function of this module.
Only MinillmError and OSError are agreed on: they are messages to the user. Any other exception is
a bug, or a reader that has gone; it propagates on its rank, and `main_guard` ends all ranks.
`main_guard` also asks all ranks to confirm an AgreedError. The work of a rank inside these
functions is no time-out of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from minillm.base.errors import CommTimeout, MinillmError, PeerFailed
from minillm.comm.communicator import Communicator

T = TypeVar("T")


class AgreedError(MinillmError):
    """An error that every rank raises; `main_guard` prints it on the first rank only."""


def agree(comm: Communicator, fn: Callable[[], T], error: type[MinillmError] = AgreedError) -> T:
    """Run `fn` on every rank and return its value. Collective.

    If it fails on any rank, every rank raises `error` with the lowest failing rank's message.
    """
    value, failure = _attempt(comm, fn)
    _raise_first(comm.gather_json(failure), error)
    return value  # type: ignore[return-value]


def gather(
    comm: Communicator, fn: Callable[[], Any], error: type[MinillmError] = AgreedError
) -> list[Any]:
    """Run `fn` on every rank and return the JSON values of all ranks in rank order. Collective.

    If it fails on any rank, every rank raises `error` with the lowest failing rank's message.
    """
    outcomes = comm.gather_json(_attempt(comm, fn))
    _raise_first([failure for _, failure in outcomes], error)
    return [value for value, _ in outcomes]


def from_first(
    comm: Communicator, fn: Callable[[], Any], error: type[MinillmError] = AgreedError
) -> Any:
    """Run `fn` on the first rank and return its JSON value on every rank. Collective.

    If it fails, every rank raises `error` with the first rank's message.
    """
    value, failure = comm.broadcast_json(_attempt(comm, fn) if comm.rank == 0 else None)
    if failure is not None:
        raise error(failure)
    return value


@contextmanager
def known_to_all() -> Iterator[None]:
    """Turn an error that every rank raises inside the block into an AgreedError.

    CommTimeout and PeerFailed stay as they are: the ranks raise them for different waits.
    """
    try:
        yield
    except (AgreedError, CommTimeout, PeerFailed):
        raise
    except MinillmError as error:
        raise AgreedError(str(error)) from None


def _attempt(comm: Communicator, fn: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the value of `fn` and None, or None and the message of its error."""
    try:
        with comm.working("at work"):
            return fn(), None
    except (CommTimeout, PeerFailed, BrokenPipeError):  # the last: `--help | head` is no error
        raise
    except MinillmError as error:
        return None, str(error)
    except OSError as error:
        text = error.strerror or str(error)
        return None, f"{text}: {error.filename}" if error.filename else text


def _raise_first(failures: list[str | None], error: type[MinillmError]) -> None:
    """Raise the lowest failing rank's message, with its number unless all ranks say the same."""
    failed = [rank for rank, text in enumerate(failures) if text is not None]
    if not failed:
        return
    first, text = failed[0], failures[failed[0]]
    if all(other == text for other in failures):
        raise error(text)
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    raise error(f"rank {first}{others}: {text}")
