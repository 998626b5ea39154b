"""Heartbeat of a rank: a file whose text changes as long as the rank gets on with its run.

A supervisor makes the folder. Without the folder no rank writes. The text is a count, not a time,
so that clocks of other hosts do not matter. Behind the last step it begins with ENDED.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

FOLDER = "heartbeats"  # in the folder of the run
ENDED = "ended"
BEAT_SECONDS = 1.0  # least time between two writes: some 50 us on a local disk, more on NFS


class Heartbeat:
    """Heartbeat file of rank `rank` in the folder of a run; a no-op where no one watches."""

    def __init__(self, run: Path, rank: int) -> None:
        self._path = run / FOLDER / f"rank-{rank:05d}" if (run / FOLDER).is_dir() else None
        self._count, self._last, self._word = 0, -BEAT_SECONDS, ""

    def beat(self) -> None:
        """Show that the rank has got on. A write that fails is tried again at the next beat."""
        now = time.monotonic()
        if self._path is None or now - self._last < BEAT_SECONDS:
            return
        self._count += 1
        if self._write():
            self._last = now

    def end(self) -> None:
        """Show that the rank has come to the end of its run. Later beats say so as well."""
        self._word = f"{ENDED} "
        if self._path is not None:
            self._write()

    def _write(self) -> bool:
        assert self._path is not None
        try:
            self._path.write_text(f"{self._word}{self._count}\n", encoding="ascii")
        except OSError:
            return False
        return True


def forget(run: Path, ranks: int) -> None:
    """Remove the files of ranks from `ranks` on, which are lost: a supervisor waits for each."""
    for path in (run / FOLDER).glob("rank-*"):
        if path.name >= f"rank-{ranks:05d}":
            path.unlink(missing_ok=True)


def beats(run: Path) -> dict[str, str]:
    """Return the text of every heartbeat file of a run, by its name."""
    found = {}
    with contextlib.suppress(OSError):
        for path in sorted((run / FOLDER).glob("rank-*")):
            found[path.name] = path.read_text(encoding="ascii", errors="replace")
    return found
