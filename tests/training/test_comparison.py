"""Law 1 as a tool: `verify` agrees with right layouts and names the worst tensor of wrong ones."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun
from training_helpers import INIT_STD, Layout, make_batches, make_config

from minillm import verify
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.parallel import collectives
from minillm.tasks.language_model import LanguageModeling
from minillm.training.comparison import Course, Deviation, compare, pieces, run, whole
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import Trainer

STEPS = 2
EPSILON = float(np.finfo(np.float32).eps)


def course(world: Communicator, config: ResolvedConfig, copy: Callable[[Trainer], Any]) -> Course:
    trainer = Trainer(config, world, LanguageModeling(make_batches(config)), std=INIT_STD)
    return run(trainer, STEPS, copy(trainer))


def deviations(layout: Layout, **changes: Any) -> list[Deviation]:
    """Compare a float32 run on thread ranks with one rank."""

    def rank(comm: Communicator) -> list[Deviation]:
        truth = own = None
        if comm.rank == 0:
            exact, alone = (
                make_config("gpt2", Layout(), dtype=dtype) for dtype in ("float64", "float32")
            )
            truth = course(SelfCommunicator(), exact, whole)
            own = course(SelfCommunicator(), alone, whole)
        config = make_config("gpt2", layout, dtype="float32", **changes)
        return compare(comm, course(comm, config, pieces), truth, own, EPSILON)

    first, *others = run_ranks(layout.num_ranks, rank)
    assert all(other == first for other in others), "ranks disagree about the verdict"
    return first


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (Layout(dp=2, num_microbatches=2), {"node_shared": "on"}),
        (Layout(dp=2, tp=2, sp=True), {}),
        (Layout(tp=2, pp=2, num_microbatches=4), {}),
    ],
    ids=str,
)
def test_right_layouts_agree(layout: Layout, changes: dict[str, Any]) -> None:
    found = deviations(layout, **changes)
    assert all(deviation.agrees for deviation in found)
    names = {deviation.name for deviation in found}
    assert {"loss of step 1", "norm of step 2"} <= names
    assert "optimizer/exp_avg/blocks.3.mlp.up.weight after step 1" in names
    assert "model/embedding.weight after step 2" in names


def test_a_wrong_layout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = staticmethod(lambda ctx, grad_outs, needs, into: (grad_outs[0],))
    monkeypatch.setattr(collectives._CopyTo, "backward", forgetful)
    found = deviations(Layout(tp=2))
    assert not found[0].agrees
    assert found[0].seen > 100 * found[0].limit
    assert found == sorted(found, key=lambda d: d.seen / d.limit)[::-1]


def test_nan_never_agrees() -> None:
    assert not Deviation("loss", 1e-7, float("nan"), 1e-5).agrees


def test_the_report_names_what_differs() -> None:
    fine = Deviation("loss of step 1", 1e-7, 2e-7, 1e-5)
    bad = dataclasses.replace(fine, name="model/x after step 1", seen=0.5)
    lines = verify.report([bad, fine])
    assert "DIFFERS" in lines[1] and "DIFFERS" not in lines[2]
    assert lines[-1] == "1 of 2 quantities differ"


SMALL = "--layers 2 --heads 2 --dim 16 --context 16 --batch 4 --data austen".split()  # noqa: SIM905


@needs_mpirun
@pytest.mark.slow
def test_the_program_exits_by_its_verdict() -> None:
    good = mpirun(4, ["-m", "minillm.verify", *SMALL, "--tp", "2", "--pp", "2"])
    assert good.returncode == 0, good.output
    assert "agree with one rank up to rounding" in good.output
    planted = (
        "import sys; from minillm.parallel import collectives; from minillm import verify\n"
        "wrong = staticmethod(lambda ctx, grad_outs, needs, into: (grad_outs[0],))\n"
        "collectives._CopyTo.backward = wrong\n"
        f"sys.exit(verify.main({[*SMALL, '--tp', '2']!r}))"
    )
    bad = mpirun(2, ["-c", planted])
    assert bad.returncode == 1, bad.output
    assert "this layout does not compute what one rank computes" in bad.output
    assert sys.executable not in bad.output  # one sentence, no traceback
