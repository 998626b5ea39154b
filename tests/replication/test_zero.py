"""ZeRO: the same training whatever is sharded."""

from __future__ import annotations

from typing import Any

import pytest
from training_helpers import Layout, assert_same, reference, train

from minillm.base.device import CPU
from minillm.comm.mesh import Mesh
from minillm.layout.placement import Layout as Placement
from minillm.replication import zero

LAYOUTS = [
    Layout(dp=2),
    Layout(dp=4, num_microbatches=2),
    Layout(dp=2, tp=2, sp=True, num_microbatches=2),
    Layout(dp=2, pp=2, num_microbatches=2),
]


def method(stage: int, group: int = 0, bucket_bytes: int = 4000) -> Any:
    def make(mesh: Mesh, layout: Placement) -> zero.Zero:
        return zero.make(mesh, layout, stage, group, bucket_bytes, CPU)

    return {"replicate": make}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_equals_one_rank(stage: int, model: str, layout: Layout) -> None:
    found = train(model, layout, optimizer="adamw", options=method(stage))
    assert_same(found, reference(model, "adamw"), 1e-9)
