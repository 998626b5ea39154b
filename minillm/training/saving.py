"""Checkpoints of a run: written at once, or with --save-async behind the steps that follow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minillm import checkpoint
from minillm.base.log import plural
from minillm.checkpoint.part import Part
from minillm.comm.agreement import known_to_all
from minillm.comm.communicator import Communicator
from minillm.tasks.protocol import Judged, Result

if TYPE_CHECKING:
    from minillm.training.loop import Run


class Saver:
    """Writer of the checkpoints of `run`, and the time that this rank waits for them.

    At most one is in flight. A run has lost nothing older if it dies meanwhile. All methods but
    `metrics` are collective over the ranks of the run, and raise AgreedError on all.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seconds = 0.0
        """Time in which this rank took no step because of checkpoints, in seconds."""
        self._reported = 0.0  # of it, in lines of the metrics
        self._number = 0
        self._behind: checkpoint.SaveBehind | None = None  # in flight

    def save(self, step: int, found: Result | None, left: bool) -> None:
        """Write the checkpoint of `step`, or begin to. With `left` it is set aside.

        Waits for the one in flight. `found` are the metrics of this step.
        """
        run = self.run
        self.wait()
        run.metrics.sync()  # before the checkpoint: no step is saved without its line
        with self._timed(), run.trainer.replication.agreed():
            options = self._options(step, found, left)
            if run.output.save_async and not left:
                self._behind = checkpoint.SaveBehind(**options)
            else:
                checkpoint.save(**options)
        self._number += 1

    def save_rest(self, world: Communicator, step: int, part: Part) -> None:
        """Write the state of `step` from parts that the ranks of `world` hold. Collective."""
        options = self._options(step, None, False)
        with self._timed():
            checkpoint.save(**(options | {"world": world, "tensors": part}))

    def advance(self, met: bool) -> None:
        """Take the checkpoint in flight further if all ranks have done their part; do not wait.

        Workers that take steps by themselves do so only where they have `met`.
        """
        if self._behind is not None and (met or self.run.trainer.replication.lockstep):
            with self._timed():
                self._behind.advance()
            self._settle()

    def wait(self) -> None:
        """Return when no checkpoint is in flight."""
        if self._behind is not None:
            with self._timed():
                self._behind.wait()
            self._settle()

    def metrics(self) -> dict[str, float]:
        """Return the seconds that steps waited for checkpoints since the last call, if any."""
        new, self._reported = self.seconds - self._reported, self.seconds
        return {"saving_seconds": new} if new else {}

    def summary(self) -> str:
        """Return the number of checkpoints and the time of the slowest rank; empty without any."""
        most = max(self.run.comm.gather_json(self.seconds))
        how = ", written behind" if self.run.output.save_async else ""
        words = f"{plural(self._number, 'checkpoint')}{how}; steps waited {most:.2f} s for them"
        return words if self._number else ""

    def _settle(self) -> None:
        if self._behind is not None and self._behind.path is not None:
            self._behind = None
            self.run.heartbeat.beat()

    def _options(self, step: int, found: Result | None, left: bool) -> dict[str, Any]:
        run, mesh = self.run, self.run.trainer.mesh
        loss = None if found is None else found.numbers().get("loss")
        judged = {"criterion": found.criterion()} if isinstance(found, Judged) else {}
        held_out = {"loss": loss, "tokens": run.output.eval_tokens, **judged}
        record = checkpoint.RunRecord(
            config=run.config.saved_values(),
            tokenizer=run.data.vocabulary(),
            vocab=run.config.model.vocab,
            corpus=run.data.sha256,
            source=run.data.source,
            key=run.key,
            position=run.position(step),
            held_out=None if loss is None else held_out,
            stopping=run.stopping.state(),
            spikes=run.spikes.state(),
        )
        return {
            "directory": run.out / checkpoint.SUBFOLDER,
            "world": run.comm,
            "mesh_shape": mesh.shape,
            "coords": mesh.coords,
            "tensors": run.trainer.state(),
            "meta": record.to_json(),
            "step": step,
            "keep": run.output.keep,
            "keep_best": run.output.keep_best,
            "left": left,
            "say": run.progress.say,
        }

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of the block, and let errors be known to all."""
        began = time.perf_counter()
        with known_to_all():
            yield
        self.seconds += time.perf_counter() - began
