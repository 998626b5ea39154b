"""Key-value heads that several tensor-parallel ranks need: one answer, nothing held twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from training_helpers import Layout, assert_same, make_config, reference, train

from minillm.layout.mesh_shape import MeshShape
from minillm.models.gpt import GPT
from minillm.models.protocol import StagePart
from minillm.parallel.heads import own_heads
from minillm.parallel.tensor import PlannedGroup, TensorParallel

CASES: dict[str, dict[str, Any]] = {
    "one head": dict(kv_heads=1),
    "one head of a width that tp does not divide": dict(kv_heads=1, head_width=6),
    "three heads of six queries": dict(heads=12, kv_heads=3, head_width=4, ffn_dim=48),
    "norm of each head": dict(kv_heads=1, qk_norm="head", bias="qkv"),
    "norm over all heads": dict(heads=12, kv_heads=3, head_width=4, qk_norm="width", bias="all"),
}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_one_rank(case: str, tp: int) -> None:
    changes = CASES[case]
    found = train("llama", Layout(tp=tp, sp=tp == 4, num_microbatches=2), **changes)
    assert_same(found, reference("llama", changes=tuple(changes.items())), 1e-10)


def test_muon_orthogonalises_whole_keys() -> None:
    found = train("llama", Layout(tp=4), optimizer="muon", kv_heads=1, head_width=6)
    wanted = reference("llama", "muon", changes=(("kv_heads", 1), ("head_width", 6)))
    assert_same(found, wanted, 1e-8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"), [(4, 1, 4), (12, 3, 2), (12, 4, 6), (8, 8, 4)]
)
def test_every_query_reads_its_own_head(heads: int, kv_heads: int, tp: int) -> None:
    """Query head h reads key-value head h // (heads / kv_heads) (Ainslie et al. 2023)."""
    read = []
    for rank in range(tp):
        own = own_heads(heads, kv_heads, PlannedGroup(rank, tp))
        read += np.repeat(own.kv, own.queries // len(own.kv)).tolist()
    assert read == np.repeat(range(kv_heads), heads // kv_heads).tolist()


def test_no_rank_holds_a_weight_twice() -> None:
    config, mesh = make_config("llama", Layout(tp=4), kv_heads=1), MeshShape(tp=4)
    part = StagePart(range(1), False, False)
    for group in (PlannedGroup(rank, 4) for rank in range(4)):
        stage = GPT(config.model, TensorParallel(group), part, seed=0)
        spec = stage.blocks[0].attention.qkv.weight.spec
        assert spec.shape == ((8 + 2) * 4, 32)
        assert spec.local_shape(mesh) == ((8 + 2) * 4 // 4, 32)
