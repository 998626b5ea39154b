"""Search for a checkpoint of a run that prunes its checkpoints meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from minillm.base.errors import CheckpointError
from minillm.checkpoint.find import find
from minillm.checkpoint.manifest import is_complete
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator

T = TypeVar("T")

MOST_LOOKS = 20


class Search(NamedTuple):
    """Question for a checkpoint: a run or a checkpoint, and whether its best is wanted."""

    folder: Path
    best: bool = False


def looking_again(
    comm: Communicator, search: Search, use: Callable[[Path], T], path: Path | None = None
) -> T:
    """Return `use` of the checkpoint `path`; of the one that `search` finds if it is None or gone.

    Looks again while the run removes what was found. `use` must raise CheckpointError on every rank
    or on none. Collective. Raises CheckpointError on every rank.
    """
    for _ in range(MOST_LOOKS):
        try:
            if path is None:
                path = Path(from_first(comm, lambda: str(find(*search)), CheckpointError))
            return use(path)
        except CheckpointError:
            if path is None or path == search.folder:
                raise
            if from_first(comm, partial(is_complete, path)):
                raise
            path = None
    raise CheckpointError(
        f"{search.folder} removes its checkpoints faster than they can be read; let the run keep "
        "more (--keep), or copy one"
    )
