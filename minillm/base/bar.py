"""Progress bar of work other than training steps: reading, tokenizing, evaluating."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from minillm.base.progress import LINE_SECONDS
from minillm.base.terminal import terminals

DELAY = 1.0  # seconds of work before the bar is shown


@contextlib.contextmanager
def bar(what: str, total: int, unit: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Show a bar while the block runs, if it takes more than a second.

    Yields the function that is called with the number of units done. `total` is 0 if it is unknown.
    Without a terminal, also that of the launcher, the bar is a line every few seconds on standard
    error.
    """
    live = terminals()[0] if shown else None
    stream: Any = live or (_Lines(sys.stderr) if sys.stderr is not None else None)
    if stream is None or not shown:
        yield lambda number: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total or None,
        desc=what,
        unit=unit,
        unit_scale=True,
        delay=DELAY,
        mininterval=0.1 if live else LINE_SECONDS,
        dynamic_ncols=bool(live),
        ncols=None if live else 72,
        leave=False,
        file=stream,
    ) as display:
        yield display.update


class _Lines:
    """Stream that turns the redrawn bar of tqdm into lines, for a log or a launcher's pipe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write the text as a line of its own."""
        if text := text.strip("\r\n "):
            self._stream.write(text + "\n")

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
