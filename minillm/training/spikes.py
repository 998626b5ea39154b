"""Loss spikes: steps whose loss or gradient norm stands far above those before, and the answer.

All ranks know both numbers before an update, and hold the same window of the steps before. So they
decide alike, without a message. `skip` leaves the update of the step out. `rewind` goes back to the
newest checkpoint and leaves out the batches from there through the spike (PaLM: Chowdhery et al.
2022, arXiv:2204.02311, section 5.1).

A number is a spike if it lies more than `--spike-threshold` deviations above the median of the
window. The deviation is the median absolute one, times SIGMA. The window holds ordinary steps
alone. A number that is not finite is a spike in every step.

Step s reads batch s + `jump` of the data. A rewind makes the jump larger, so the order of the data
stays a function of seed and number. The record of a checkpoint keeps window, jump, and the numbers
of all sequences that were left out: a run that is resumed decides as one that went on.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm import checkpoint
from minillm.base.errors import CheckpointError
from minillm.base.log import plural
from minillm.checkpoint.find import newest_good
from minillm.checkpoint.manifest import replace_meta
from minillm.comm.agreement import AgreedError, agree, from_first, known_to_all
from minillm.training.early_stopping import EarlyStopping
from minillm.training.folder import go_back
from minillm.training.options import SpikeOptions
from minillm.training.report import step_metrics
from minillm.training.verdict import Verdict

if TYPE_CHECKING:
    from minillm.training.loop import Run
    from minillm.training.step import StepReport

SIGMA = 1.4826  # standard deviation of a normal distribution, divided by its median absolute one
LEAST = 0.01  # of the median: the least deviation, where all numbers are nearly equal


class Spike(NamedTuple):
    """Loss or norm of a step that stands out."""

    loss: float
    norm: float
    text: str  # as in "loss 9.13, 41 deviations above the median 2.31 of 100 steps"


class Spikes:
    """Window of losses and norms of a run, and what it has left out.

    `state` is that of a checkpoint. Raises CheckpointError if it is malformed. Invariant: equal on
    all ranks.
    """

    def __init__(
        self, options: SpikeOptions | None = None, state: Mapping[str, Any] | None = None
    ) -> None:
        self.options = options or SpikeOptions()
        self.on, self.rewinds = self.options.on_spike != "off", self.options.on_spike == "rewind"
        self._fill(state or {})

    def _fill(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        held = _read(state)
        self.losses = deque(held["losses"], self.options.spike_window)
        self.norms = deque(held["norms"], self.options.spike_window)
        self.in_row: int = held["in_row"]
        """Spikes in a row that were skipped."""
        self.jump: int = held["jump"]
        """Batches of the data that rewinds have left out."""
        self.left_out: list[tuple[int, int]] = held["left_out"]
        """Numbers (start, stop) of sequences that no update has seen, ascending."""
        self.back_to, self.tries = held["back_to"], held["tries"]
        """Step of the last rewind's checkpoint, -1 before one, and the rewinds to it."""

    def judge(self, step: int, verdict: Verdict) -> Spike | None:
        """Return the spike that step `step` (from 0) is, None for an ordinary step.

        Raises NotFinite on every rank if spikes are not looked for and a number is not finite.
        """
        if not self.on:
            verdict.numbers()
            return None
        loss, norm = verdict.read()
        texts = [
            _standing_out(name, value, window, self.options)
            for name, value, window in (
                ("loss", loss, self.losses),
                ("gradient norm", norm, self.norms),
            )
        ]
        text = " and ".join(filter(None, texts))
        if text:
            self.in_row += 1
            return Spike(loss, norm, text)
        self.losses.append(loss)
        self.norms.append(norm)
        self.in_row = 0
        return None

    def leave_out(self, start: int, stop: int) -> None:
        """Note that no update has seen the sequences from `start` to `stop`."""
        if self.left_out and self.left_out[-1][1] >= start:
            start = min(start, self.left_out.pop()[0])
        self.left_out.append((start, stop))

    def go_back(self, state: Mapping[str, Any], step: int, jump: int) -> None:
        """Go on from the checkpoint after `step` steps, which holds `state`, with a larger jump."""
        self._fill(state)
        self.tries = self.tries + 1 if step == self.back_to else 1
        self.back_to, self.jump, self.in_row = step, jump, 0

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps as a JSON value; None if there is nothing to keep."""
        if not (self.on or self.left_out):
            return None
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "in_row": self.in_row,
            "jump": self.jump,
            "left_out": [list(each) for each in self.left_out],
            "back_to": self.back_to,
            "tries": self.tries,
        }

    def describe(self) -> str:
        """Return what happens at a spike, for the plan."""
        options = self.options
        way = "the run goes back to its newest checkpoint" if self.rewinds else "no update"
        return (
            f"{way} where the loss or the gradient norm is {options.spike_threshold:g} deviations "
            f"above the median of {plural(options.spike_window, 'step')}"
        )


def _read(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint, with defaults for what it lacks."""
    try:
        windows = {name: list(map(float, state.get(name, ()))) for name in ("losses", "norms")}
        left_out = [(int(start), int(stop)) for start, stop in state.get("left_out", ())]
        counts = {name: int(state.get(name, 0)) for name in ("in_row", "jump", "tries")}
        return {**windows, "left_out": left_out, "back_to": int(state.get("back_to", -1)), **counts}
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"the record of spikes in this checkpoint is malformed: {error}"
        ) from None


def deviations(value: float, window: Sequence[float]) -> float:
    """Return by how many deviations `value` lies above the median of `window`."""
    middle = statistics.median(window)
    spread = SIGMA * statistics.median(abs(other - middle) for other in window)
    spread = max(spread, LEAST * abs(middle))
    if not spread:
        return math.inf if value > middle else 0.0
    return (value - middle) / spread


def _standing_out(
    name: str, value: float, window: Sequence[float], options: SpikeOptions
) -> str | None:
    """Return why a number is a spike, None for an ordinary one."""
    if not math.isfinite(value):
        return f"{name} {value}"
    if len(window) < options.spike_window // 2:
        return None
    found = deviations(value, window)
    if found <= options.spike_threshold:
        return None
    return (
        f"{name} {value:.4g}, {found:.3g} deviations above the median "
        f"{statistics.median(window):.4g} of {plural(len(window), 'step')}"
    )


def answer(run: Run, report: StepReport) -> int | None:
    """Answer the spike of a step that has changed no weight, on all ranks alike.

    Returns the completed steps of the checkpoint to which the run has gone back, None if the run
    goes on. Collective. Raises AgreedError on every rank if the limit is reached.
    """
    spikes, spike, step = run.spikes, report.spike, report.step
    assert spike is not None
    if spikes.rewinds:
        return _rewind(run, report, spike)
    if spikes.in_row > spikes.options.spike_limit:
        run.saver.wait()
        raise AgreedError(
            f"step {step + 1}: {spike.text}; the updates of {spikes.in_row} steps in a row were "
            f"left out, more than --spike-limit {spikes.options.spike_limit}; {_way_out(run)}"
        )
    spikes.leave_out(run.position(step), run.position(step + 1))
    return None


def _rewind(run: Run, report: StepReport, spike: Spike) -> int:
    """Go back to the newest good checkpoint, and leave out the sequences from there on.

    A crash in between goes back once more: the new position is written last.
    """
    spikes, step = run.spikes, report.step
    run.saver.wait()
    path = Path(from_first(run.comm, lambda: _newest(run.out)))
    with known_to_all():
        source, record = checkpoint.CheckpointSource(path), checkpoint.RunRecord.read(path)
        back, stop = source.manifest.step, run.position(step + 1)
        spikes.go_back(record.spikes or {}, back, step + 1 + spikes.jump - back)
        where = f"step {step + 1}: {spike.text}"
        if spikes.tries > spikes.options.spike_limit:
            raise AgreedError(
                f"{where}; the run has gone back to step {back} {spikes.tries - 1} times, and no "
                f"further than --spike-limit {spikes.options.spike_limit}; {_way_out(run)}"
            )
        start = stop if record.position is None else record.position
        spikes.leave_out(start, stop)
        run.trainer.load(source)
        run.trainer.forget()
    run.trainer.begun = run.trainer.done = run.settled = run.saved_step = back
    origin, stopping = run.origin, record.stopping
    if origin is not None and origin.continues and origin.step == back:
        stopping = origin.stopping(run.config.options)  # the held-out data may be others now
    run.stopping = EarlyStopping(run.output.patience, stopping)
    meta = dataclasses.replace(record, spikes=spikes.state(), position=stop).to_json()
    line = step_metrics(report, run.config.tokens_per_step, {}, run.device) | {"back_to": back}

    def write_down() -> None:
        run.metrics.write(**line)
        go_back(run.out, back, keep=True)
        replace_meta(path, meta)

    agree(run.comm, lambda: write_down() if run.comm.rank == 0 else None)
    run.close_places()
    agree(run.comm, lambda: run.open_places(back))
    run.begin_policy()
    run.log(f"{where}; back to step {back}, without sequences {start} to {stop - 1} of the data")
    return back


def _newest(run: Path) -> str:
    """Return the newest checkpoint whose files are whole. Raises CheckpointError without one."""
    found = newest_good(run)
    if found is None:
        raise CheckpointError(f"no checkpoint in {run} is whole, so the run cannot go back to one")
    return str(found)


def _way_out(run: Run) -> str:
    """Return what to do at the limit. Collective."""
    options = "another --lr, --clip or --spike-threshold"
    if not from_first(run.comm, lambda: bool(checkpoint.run_steps(run.out))):
        return f"look at the data, or start again with {options}"
    way = f"go on from the newest checkpoint with {options}, as in: --resume {run.out}"
    return f"look at the data, or {way}"
