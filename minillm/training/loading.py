"""State with which a run starts: that of a checkpoint to go on from, or weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minillm import checkpoint
from minillm.base.errors import CheckpointError
from minillm.comm.agreement import agree, known_to_all
from minillm.nn.lora import Merged
from minillm.training.assembly import first_rows, fresh_heads
from minillm.training.origin import Origin
from minillm.weights.origin import looking_again, source_of, verify

if TYPE_CHECKING:
    from minillm.training.loop import Run


def load(run: Run, origin: Origin, moved: str | None) -> None:
    """Fill the state of a run from the checkpoint of `origin`, and say what changes with this run.

    `moved` is a line about its data. Collective. Raises CheckpointError on every rank.
    """
    if not origin.continues:
        with known_to_all():
            _load_weights(run, origin)
        return
    found, record = origin.path, origin.record
    with known_to_all():
        verify(found, run.comm)
        source = checkpoint.CheckpointSource(found)
        run.trainer.load(source)
    if run.spikes.back_to == origin.step:
        run.trainer.forget()
    run.log(f"resumed from {found} at step {origin.step}")
    lost = checkpoint.fallbacks(source, run.trainer.state())
    for line in (*origin.changes(run.config), *([moved] if moved else []), *lost):
        run.log(line)
    difference = checkpoint.difference(record.key, run.key)
    if difference and not run.is_new:
        how = "change from here on" if lost else "continue to rounding, not bit for bit"
        run.log(f"results {how}: {difference}")


def _load_weights(run: Run, origin: Origin) -> None:
    """Fill the weights alone, and say from where.

    If a run that is training has removed the checkpoint meanwhile, another of it serves.
    """

    def fill(path: Path) -> None:
        verify(path, run.comm)
        dtype = run.config.options.compute.dtype
        source = agree(run.comm, lambda: source_of(path, dtype), CheckpointError)
        fresh = fresh_heads(source, run.config)
        run.trainer.load_weights(first_rows(source, run.config), fresh)
        by = ""
        held = source.source if isinstance(source, Merged) else source
        if isinstance(held, checkpoint.CheckpointSource):
            steps = held.manifest.step
            by = f", trained on {origin.record.source} for {steps} steps"
        run.log(f"weights from {path}{by}")
        if fresh:
            parts = " and ".join(sorted({name.split("/")[1].split(".")[0] for name in fresh}))
            run.log(f"initial values for {parts}, which these weights do not have")

    looking_again(run.comm, origin.search, fill, origin.path)
