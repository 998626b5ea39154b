"""Files and output of a run that goes on after losing ranks, told as one run.

`metrics.jsonl` keeps one line a step: the first of the ranks that are left cuts it after the steps
that all ranks had settled, and writes the line of a step in between again. `losses.jsonl` has a
line for each loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minillm import checkpoint
from minillm.base.lock import FolderLock, FolderTaken
from minillm.base.log import plural
from minillm.base.metrics_file import METRICS, MetricsFile, keep_until, open_regular, steps_of
from minillm.checkpoint.peers import newest_part
from minillm.comm.agreement import AgreedError, agree, from_first
from minillm.comm.buffers import ReduceOp
from minillm.comm.process import show_output
from minillm.training.heartbeat import forget
from minillm.training.newcomer import description
from minillm.training.numeric_key import numeric_key
from minillm.training.report import step_metrics
from minillm.training.resolve import ResolvedConfig
from minillm.training.step import StepReport
from minillm.training.survival import Loss, NoReplicaLeft, Respawn, Survivors, Welcome
from minillm.training.trainer import Trainer

if TYPE_CHECKING:
    from minillm.training.loop import Run

LOG = "losses.jsonl"  # in the folder of the run
LOCK_SECONDS = 5.0  # for the system to release the lock of a dead rank
NEW_RANK = "--new-rank"  # the one word of a command line of `minillm.train` in another's place
COMMAND = ("-m", "minillm.train", NEW_RANK)  # arguments of Python that start a new rank


def describe(config: ResolvedConfig) -> str:
    """Return how a run goes on after a loss, for the plan."""
    ways = {
        "shrink": "the run goes on with fewer replicas after a rank is lost",
        "respawn": "a new process takes the place of a lost rank; where none can be started, the "
        "run goes on with fewer replicas",
    }
    return f"{ways[config.options.comm.on_failure]}; memory is not shared on a node"


def survivors(run: Run, welcome: Welcome | None = None) -> Survivors:
    """Return the ranks of a run, and how it goes on after a loss. Collective over its ranks.

    `welcome` is for a new rank, which makes no trainer yet.
    """
    options = run.config.options.comm
    respawns = options.on_failure == "respawn"
    return Survivors(
        run.comm,
        run.config,
        run.make,
        lambda trainer: _from_disk(run, trainer),
        lambda survivors, loss: _take_over(run, survivors, loss),
        Respawn(COMMAND, lambda: description(run), welcome) if respawns else None,
        options.buddy_every * options.buddy,
    )


def train(run: Run, steps: Callable[[], None]) -> bool:
    """Call `steps` to the end of a run; return False on a rank that is left without a replica.

    Raises AgreedError on one rank if too few are left for one replica.
    """
    assert run.survivors is not None
    try:
        return run.survivors.run(steps)
    except NoReplicaLeft as error:
        _save_rest(run, error)
        if not error.tells:
            return False
        size, mesh = error.world.size, run.config.mesh
        saved = list(checkpoint.run_steps(run.out))
        way = f"go on from step {saved[-1]} with --resume {run.out}" if saved else "start again"
        raise AgreedError(
            f"{plural(size, 'rank')} of {run.started_with} {'is' if size == 1 else 'are'} left, "
            f"too few for a replica of tp {mesh.tp} x pp {mesh.pp}; {way} on {mesh.tp * mesh.pp} "
            "ranks or more"
        ) from None


def _save_rest(run: Run, error: NoReplicaLeft) -> None:
    """Save the state if ranks without a replica hold all of it, as with buddies. Collective."""
    world = error.world
    if not all(world.gather_json(bool(error.names))):
        return
    found = newest_part(world, error.states, error.names)
    saved = from_first(world, lambda: max(checkpoint.run_steps(run.out), default=0))
    if found is None or found[0] <= saved:
        return
    step, part = found
    run.metrics.close()
    agree(world, lambda: _own(run, step) if world.rank == 0 else None)
    run.saver.save_rest(world, step, part)


def _own(run: Run, step: int) -> None:
    """Own the folder, and cut the metrics to `step` steps, of which the last may lack its line."""
    if not run.owns:
        run.lock, run.owns = _claimed(run.out), True
    path, last = run.out / METRICS, run.trainer.last
    keep_until(step, path, path)
    run.metrics = MetricsFile(path, run.progress.say)
    if last is not None and _last_line(run) < last.step + 1 == step:
        run.metrics.write(**step_metrics(last, run.config.tokens_per_step, {}, run.device))
    run.metrics.sync()


def _last_line(run: Run) -> int:
    """Return the last step in the metrics, 0 without one."""
    return max((step for step, _ in steps_of(run.out / METRICS)), default=0)


def _from_disk(run: Run, trainer: Trainer) -> int:
    """Fill a trainer from the newest checkpoint of the run, else as at its start.

    Returns the completed steps. Collective over the ranks of the trainer.
    """
    run.comm, run.trainer = trainer.world, trainer
    found = from_first(run.comm, lambda: [str(p) for p in checkpoint.run_steps(run.out).values()])
    if found:
        source = checkpoint.CheckpointSource(Path(found[-1]))
        trainer.load(source)
        return source.manifest.step
    if run.origin is not None:
        run.load(run.origin, None)
    return run.first_step


def _take_over(run: Run, survivors: Survivors, loss: Loss) -> None:
    """Go on with the files of the run on the ranks that are left. Collective over them."""
    group, trainer, known = survivors.world, survivors.trainer, not run.is_new
    if known:
        run.outcome = run.trainer.last or run.outcome
    run.comm, run.trainer, run.config = group, trainer, survivors.config
    own = [run.settled, run.saved_step] if known else [loss.step, loss.step]
    settled, saved = map(int, group.reduce_numbers(own, ReduceOp.MIN))
    settled = min(settled, loss.step)
    if from_first(group, lambda: _last_line(run)) == settled - 1:
        settled -= 1  # the first rank was lost before it had written its line
    run.settled, run.saved_step, run.unsettled = settled, saved, None
    if loss.from_memory and run.settled < loss.step:
        run.unsettled = _outcome(run, loss)
    if not loss.from_memory:
        run.settled, run.saved_step = loss.step, -1
    run.key = numeric_key(run.config, group, 1, run.device)
    run.begin_policy()
    run.log.rank = group.rank
    if known:
        run.metrics.close()
        run.writers.close()
    if group.rank == 0:
        show_output()
    agree(group, lambda: _write_down(run, loss) if group.rank == 0 else None)
    agree(group, lambda: run.open_places(run.settled))
    run.is_new = False  # not before: after a further loss a new rank comes here again
    run.log(_line(loss))


def _outcome(run: Run, loss: Loss) -> StepReport:
    """Return the outcome of the last step, which some ranks get from others. Collective.

    A new rank has none, nor has one whose recovery a further loss has broken off.
    """
    found = run.outcome
    if found is not None and found.step + 1 != loss.step:
        found = None
    everyone = run.comm.gather_json(None if found is None else found.to_json())
    found = found or StepReport.from_json(next(filter(None, everyone)))
    return found._replace(stop=False)  # a signal stops the next step instead


def _line(loss: Loss) -> str:
    """Return the line about a loss."""
    mesh, lost = loss.mesh, plural(loss.before - loss.survivors, "rank")
    where = "memory" if loss.from_memory else "disk"
    left = loss.survivors + loss.respawned - mesh.num_ranks
    new = f", {plural(loss.respawned, 'new rank')}" if loss.respawned else ""
    why = " ".join(loss.reason.split())
    return (
        f"lost {lost} of {loss.before}{new}: going on after step {loss.step}, from {where}, with "
        f"dp {mesh.dp} x tp {mesh.tp} x pp {mesh.pp}"
        + (f"; {plural(left, 'rank')} more without a replica" if left else "")
        + (f"; {why}" if why else "")
    )


def _write_down(run: Run, loss: Loss) -> None:
    """Own the folder on the first rank, cut the metrics, and add a line about the loss."""
    if not run.owns:
        run.lock, run.owns = _claimed(run.out), True
    forget(run.out, loss.mesh.num_ranks)
    keep_until(run.settled, run.out / METRICS, run.out / METRICS)
    line = {
        "step": loss.step,
        "before": loss.before,
        "survivors": loss.survivors,
        "respawned": loss.respawned,
        "dp": loss.mesh.dp,
        "tp": loss.mesh.tp,
        "pp": loss.mesh.pp,
        "state": "memory" if loss.from_memory else "disk",
        "time": time.time(),
    }
    with open_regular(run.out / LOG, "ab") as file:
        file.write(json.dumps(line).encode() + b"\n")


def _claimed(folder: Path) -> FolderLock:
    """Return the lock of the folder, which the system takes from the dead first rank."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return FolderLock(folder)
        except FolderTaken:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
