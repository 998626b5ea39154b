"""Closed formulas of the data axis against the ledger, exactly, for every method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from training_helpers import Layout, make_batches, make_config, with_layout

from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.layout.flat import FlatLayout
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import ShardSpec
from minillm.params.parameter import Constant, Parameter
from minillm.replication.compressed import codec_of
from minillm.replication.costs import DataAxis
from minillm.replication.methods import payload
from minillm.replication.options import ReplicationOptions
from minillm.tasks.language_model import LanguageModeling
from minillm.training.costs import data_axis
from minillm.training.trainer import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "all-reduce": {},
    "node-shared": {"node_shared": "on"},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "zero1-groups": {"zero": 1, "shard_group": 2},
    "zero3-groups": {"zero": 3, "shard_group": 2},
    "local": {"local_steps": 2},
    "local-fragments": {"local_steps": 2, "fragments": 2},
    "levels": {"node_shared": "off"},
    "local-levels": {"local_steps": 2},
    "bf16": {"compress": "bf16"},
    "powersgd": {"compress": "powersgd", "compress_rank": 2},
    "topk": {"compress": "topk", "compress_share": 0.03},
    "onebit": {"compress": "onebit"},
}


@pytest.mark.parametrize(
    ("method", "model"),
    [
        pytest.param(method, model, marks=() if i % 2 == j else pytest.mark.matrix)
        for i, method in enumerate(METHODS)
        for j, model in enumerate(["gpt2", "gpt2-untied"])
    ],
)
def test_the_formula_is_what_the_ledger_counts(method: str, model: str) -> None:
    layout = Layout(dp=2, num_microbatches=2)
    if method.endswith(("groups", "levels")):
        layout = with_layout(layout, dp=4)
    nodes = [0, 0, 1, 1] if method.endswith("levels") else None
    config = make_config(model, layout, layers=2, dim=24, **METHODS[method])

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        for step in range(2):
            trainer.step(step)
        counted = {
            key[:2]: row.bytes
            for key, row in ledger().rows.items()
            if key[2] in ("payload", "window") and row.bytes
        }
        return counted, dict(payload(data_axis(trainer), 2))

    for counted, expected in run_ranks(layout.num_ranks, rank, nodes=nodes):
        assert ("dp between nodes", "all_reduce") in expected or nodes is None
        assert counted and counted == expected


def _axis(**options: Any) -> DataAxis:
    """Return rank 0 of 4 with a matrix of 16 x 32 and a bias of 10, in a buffer of 512 + 16."""
    parameters = []
    for name, shape in (("blocks.0.weight", (16, 32)), ("blocks.0.bias", (10,))):
        spec = ShardSpec.replicated(*shape)
        parameters.append(Parameter(spec, Constant(0.0), decay=len(shape) > 1))
        parameters[-1].name = name
    mesh = MeshShape(dp=4)
    flat = FlatLayout(parameters, mesh, 16)
    return DataAxis(
        layouts=[flat],
        mesh=mesh,
        options=ReplicationOptions(**options),
        item=4,
        wide=4,
        rank=0,
    )


def test_formulas_by_hand() -> None:
    assert payload(_axis()) == {("dp", "all_reduce"): 522 * 4}
    assert payload(_axis(zero=1), 3) == {
        ("dp", "reduce_scatter"): 3 * 528 * 4,
        ("dp gather", "all_gather"): 3 * 528 * 4,
    }
    twice = dataclasses.replace(_axis(zero=2), passes="FBFB")
    assert payload(twice)["dp", "reduce_scatter"] == 2 * 528 * 4
    assert payload(_axis(local_steps=5), 14) == {("dp", "all_reduce"): 2 * 522 * 4}
    parts = [payload(_axis(local_steps=4, fragments=2), steps) for steps in range(1, 9)]
    assert [sum(each.values()) // (522 * 4) for each in parts] == [0, 0, 0, 1, 1, 1, 1, 2]
    eight = dataclasses.replace(_axis(), mesh=MeshShape(dp=8))
    levels = dataclasses.replace(eight, nodes={"dp": (4, 1)})  # 522 = 130 + 131 + 130 + 131
    assert payload(levels) == {
        ("dp in node", "reduce_scatter"): 522 * 4,
        ("dp in node", "all_gather"): 522 * 4,
        ("dp between nodes", "all_reduce"): 131 * 4,
    }
    shared = dataclasses.replace(_axis(), shared_by=4)
    assert payload(shared) == {("dp in node", "sum"): 3 * 128 * 4}  # 33 lines of 16: 8 of them
    powersgd = payload(_axis(compress="powersgd"))
    assert powersgd == {("dp", "all_reduce"): (4 * (16 + 32) + 10) * 4}
    topk = codec_of(ReplicationOptions(compress="topk")).payload([(16, 32)], 4, 4)
    assert topk == {"all_gather": 4 * 6 * 8}  # ceil(0.01 x 512) values and places
    onebit = codec_of(ReplicationOptions(compress="onebit")).payload([(16, 32)], 4, 4)
    assert onebit == {"all_to_all": 64 + 16, "all_gather": 64 + 16}
