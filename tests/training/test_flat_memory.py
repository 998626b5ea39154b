"""Memory stays flat: steps, evaluations and checkpoints leave nothing behind.

The collector is off during a run, so an object in a cycle would stay for ever.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import new_trainer, save_trainer
from training_helpers import VOCAB, Layout, make_config

from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.batches import eval_windows
from minillm.tasks.language_model import HeldOutText
from minillm.training.held_out import measure
from minillm.training.trainer import Trainer


def work(trainer: Trainer, comm: Communicator, folder: Path) -> dict[str, Callable[[int], Any]]:
    """Return what a run does again and again, by name."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, 300)
    held_out = HeldOutText(eval_windows(tokens, trainer.config.model.context, 200), 1.0)
    return {
        "step": trainer.step,
        "evaluation": lambda step: measure(trainer.model, held_out, comm, 2),
        "checkpoint": lambda step: save_trainer(trainer, folder, step + 1),
    }


def leftovers(comm: Communicator, act: Callable[[int], Any], times: int) -> tuple[int, Counter]:
    """Run `act` some times without the collector.

    Returns the objects in cycles, and the growth of the number of live objects by type.
    """
    for step in range(3):
        act(step)
        live(comm)
    before = live(comm)
    for step in range(3, 3 + times):
        act(step)
    cyclic, after = collected(comm), live(comm)
    return cyclic, after - before


def live(comm: Communicator) -> Counter:
    """Return the live objects by type on rank 0, counted while the other threads wait."""
    comm.barrier()
    found = [type(found).__name__ for found in gc.get_objects()] if comm.rank == 0 else []
    comm.barrier()
    return Counter(found)


def collected(comm: Communicator) -> int:
    """Return the number of objects in cycles on rank 0, collected while the others wait."""
    comm.barrier()
    found = gc.collect() if comm.rank == 0 else 0
    comm.barrier()
    return found


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, num_microbatches=2)], ids=str)
@pytest.mark.slow
def test_nothing_stays_without_the_collector(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 20
    # The flight recorder of a rank is full before objects are counted.
    monkeypatch.setattr("minillm.comm.ledger.NUM_RECENT", 8)

    def rank(comm: Communicator) -> dict[str, tuple[int, Counter]]:
        config = make_config("gpt2", layout, layers=2, heads=4, dim=16, context=8, batch=8)
        trainer = new_trainer(comm, config)
        acts = work(trainer, comm, tmp_path)
        return {name: leftovers(comm, act, times) for name, act in acts.items()}

    gc.collect()
    gc.freeze()  # the objects of other tests are not counted
    gc.disable()
    try:
        found = run_ranks(layout.num_ranks, rank)
    finally:
        gc.enable()
        gc.unfreeze()
    for per_rank in found:
        for name, (cyclic, grown) in per_rank.items():
            assert cyclic == 0, f"a {name} leaves objects in cycles"
            # A few locks of thread ranks come and go; a leak would be at least one object each.
            assert all(more < times for more in grown.values()), f"{name}: {grown}"


def test_300_evaluations_and_checkpoints_need_the_memory_of_30(tmp_path: Path) -> None:
    """Check resident memory, open files and objects of a real run, after 30 steps and after 300."""
    text, program = tmp_path / "text.txt", tmp_path / "soak.py"
    text.write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    program.write_text(
        "import gc, json, os, sys\n"
        "from pathlib import Path\n"
        "from minillm import train\n"
        "from minillm.training.loop import Run\n"
        "save, seen = Run._save, []\n"
        "def counted(run, step, *rest):\n"
        "    save(run, step, *rest)\n"
        "    if step in (30, 300):\n"
        "        pages = int(Path('/proc/self/statm').read_text().split()[1])\n"
        "        files = len(os.listdir('/proc/self/fd'))\n"
        "        seen.append([pages * os.sysconf('SC_PAGE_SIZE'), files, len(gc.get_objects())])\n"
        "    if step == 300:\n"
        "        print('seen', json.dumps(seen))\n"
        "Run._save = counted\n"
        "sys.exit(train.main())\n"
    )
    options = "--layers 2 --heads 2 --dim 16 --context 16 --batch 8 --steps 301 --sample-tokens 0"
    options += " --eval-every 1 --save-every 1 --eval-tokens 400"
    done = subprocess.run(
        [sys.executable, str(program), *options.split(), "--data", str(text)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("seen"))
    (memory, files, objects), (memory_later, files_later, objects_later) = json.loads(line[5:])
    assert files_later == files
    assert objects_later - objects < 270, "an object for each step"
    # 270 evaluations of 400 tokens would have kept 1.7 MB.
    assert memory_later - memory < 1e6
