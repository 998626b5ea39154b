"""Node-shared memory: ranks compute what one rank computes and hold one copy.

They move the bytes that the formula says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_helpers import (
    INIT_STD,
    Layout,
    assert_same,
    make_batches,
    make_config,
    reference,
    train,
)

from minillm.base.arrays import root
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.params.storage import PrivateMemory
from minillm.replication import node_shared
from minillm.replication.all_reduce import AllReduce
from minillm.replication.node_shared import NodeShared
from minillm.tasks.language_model import LanguageModeling
from minillm.training.trainer import Trainer

Patch = pytest.MonkeyPatch

LAYOUTS: list[tuple[str, Layout, list[int]]] = [
    ("gpt2", Layout(dp=2), [0, 0]),
    ("gpt2", Layout(dp=4, num_microbatches=2), [0, 0, 0, 0]),
    ("gpt2", Layout(dp=4), [0, 0, 1, 1]),
    ("llama", Layout(dp=8), [0, 0, 0, 0, 1, 1, 1, 1]),
    ("gpt2", Layout(dp=2, tp=2, sp=True), [0, 0, 0, 0]),
    ("gpt2", Layout(dp=4, tp=2, sp=True, num_microbatches=2), [0, 0, 0, 0, 1, 1, 1, 1]),
    ("llama", Layout(dp=2, pp=2, num_microbatches=4), [0, 0, 1, 1]),
    ("gpt2", Layout(dp=2, pp=2, num_microbatches=4, schedule="gpipe"), [0, 0, 0, 0]),
    ("gpt2", Layout(dp=2, tp=2, pp=2, num_microbatches=2), [0] * 8),
]


def _name(value: object) -> str:
    return "nodes" + "".join(map(str, value)) if isinstance(value, list) else str(value)


QUICK = (0, 2, 4, 6)  # one node and two, alone, with sequence parallelism and in a pipeline


@pytest.mark.parametrize(
    ("model", "layout", "nodes"),
    [
        pytest.param(*cell, marks=() if i in QUICK else pytest.mark.matrix)
        for i, cell in enumerate(LAYOUTS)
    ],
    ids=_name,
)
def test_equals_one_rank(model: str, layout: Layout, nodes: list[int]) -> None:
    for optimizer in ("sgd", "adamw"):
        found = train(model, layout, optimizer=optimizer, nodes=nodes, node_shared="on")
        assert_same(found, reference(model, optimizer), 1e-10 if optimizer == "sgd" else 1e-6)


def _trainers(
    layout: Layout, nodes: list[int], then: Callable[[Trainer], object], **changes: object
) -> list[object]:
    config = make_config("gpt2", layout, **changes)
    return run_ranks(layout.num_ranks, lambda comm: then(_trained(config, comm)), nodes=nodes)


def _kind(trainer: Trainer) -> tuple[type, str]:
    memory = trainer.replication.memory
    return type(memory), memory.description


def _trained(config: object, comm: Communicator) -> Trainer:
    task = LanguageModeling(make_batches(config))  # type: ignore[arg-type]
    trainer = Trainer(config, comm, task, std=INIT_STD)  # type: ignore[arg-type]
    trainer.step(0)
    return trainer


def test_one_copy_on_a_node() -> None:
    """Compare addresses of weights, optimizer state and gradients.

    Ranks of a node share the weights and the optimizer state. Each rank has its own gradients.
    """

    def addresses(trainer: Trainer) -> list[int]:
        (buffers,) = trainer.model.buffers
        exp_avg = root(trainer.optimizer.state()["exp_avg"][0].array)
        return [root(array).ctypes.data for array in (buffers.values, exp_avg, buffers.grads)]

    found = _trainers(Layout(dp=4), [0, 0, 1, 1], addresses, node_shared="on")
    values, states, grads = (list(column) for column in zip(*found, strict=True))  # type: ignore[call-overload]
    for shared in (values, states):
        assert shared[0] == shared[1] != shared[2] == shared[3]
    assert len(set(grads)) == 4


@pytest.mark.parametrize("nodes", [[0, 0, 0, 0], [0, 0, 1, 1]])
def test_window_bytes_are_those_of_the_formula(nodes: list[int]) -> None:
    """Check the bytes of a step: each of n ranks on a node reads n - 1 shares.

    Between nodes each share is all-reduced once. Nothing else is payload.
    """

    def moved(trainer: Trainer) -> None:
        (buffers,) = trainer.model.buffers
        share = (
            sum(part.stop - part.start for _, part in buffers.shared_runs())
            * buffers.grads.itemsize
        )
        gaps = 64 * len(buffers.layout.runs)  # between two runs: never read
        rows = {key: row.bytes for key, row in ledger().rows.items() if key[2] != "control"}
        per_node = nodes.count(0)
        assert rows.pop(("dp in node", "sum", "window")) == (per_node - 1) * share
        if per_node < len(nodes):
            assert rows.pop(("dp between nodes", "all_reduce", "payload")) == share
        assert not rows
        assert abs(share - buffers.values.nbytes / per_node) <= 64 + gaps

    _trainers(Layout(dp=4), nodes, moved, node_shared="on")


def test_auto_shares_where_it_can() -> None:
    kinds = _trainers(
        Layout(dp=4),
        [0, 0, 1, 1],
        lambda trainer: type(trainer.replication),
        node_shared="auto",
    )
    assert kinds == [NodeShared] * 4
    kinds = _trainers(
        Layout(tp=2), [0, 0], lambda trainer: type(trainer.replication), node_shared="auto"
    )
    assert kinds == [AllReduce] * 2


OBSTACLES = {
    "nodes of their own": (Layout(dp=2), [0, 1], "node of its own"),
    "unequal nodes": (
        Layout(dp=4),
        [0, 0, 0, 1],
        "different numbers of data-parallel ranks (1 and 3)",
    ),
    # Ranks of tp 0 are on nodes 0 1 0 1, those of tp 1 on nodes 0 0 1 1.
    "replicas torn apart": (Layout(dp=4, tp=2), [0, 0, 1, 0, 0, 1, 1, 1], "different places"),
}


@pytest.mark.parametrize("name", list(OBSTACLES))
def test_what_cannot_be_shared_is_said(name: str) -> None:
    layout, nodes, words = OBSTACLES[name]
    with pytest.raises(ConfigError, match=re.escape(words)):
        _trainers(layout, nodes, lambda trainer: None, node_shared="on")
    said = _trainers(
        layout,
        nodes,
        lambda trainer: _kind(trainer),
        node_shared="auto",
    )
    assert all(kind is PrivateMemory and words in text for kind, text in said)  # type: ignore[misc]


def test_too_little_shared_memory(monkeypatch: Patch) -> None:
    monkeypatch.setattr(node_shared, "free_shared_bytes", lambda: node_shared.SPARE_BYTES)
    with pytest.raises(ConfigError, match="MB free where"):
        _trainers(Layout(dp=2), [0, 0], lambda trainer: None, node_shared="on")


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Save on four sharing ranks, and compare the losses of three resumed runs.

    They have four sharing ranks on one node, four on two nodes, and one rank.
    """
    from minillm import checkpoint

    def save(trainer: Trainer) -> None:
        checkpoint.save(
            tmp_path,
            world=trainer.world,
            mesh_shape=trainer.mesh.shape,
            coords=trainer.mesh.coords,
            tensors=trainer.state(),
            meta={},
            step=1,
            keep=1,
        )

    def resume(trainer: Trainer) -> list[float]:
        trainer.load(checkpoint.CheckpointSource(checkpoint.find(tmp_path)))
        return [trainer.step(step).loss for step in (1, 2, 3)]

    _trainers(Layout(dp=4), [0] * 4, save, node_shared="on")
    alone = _trainers(Layout(), [0], resume)[0]
    for nodes in ([0] * 4, [0, 0, 1, 1]):
        for losses in _trainers(Layout(dp=4), nodes, resume, node_shared="on"):
            np.testing.assert_allclose(losses, alone, rtol=1e-10)  # type: ignore[arg-type]


def _forget_a_rank(patch: Patch) -> None:
    original = node_shared.NodeMemory.everyones
    patch.setattr(
        node_shared.NodeMemory,
        "everyones",
        lambda self, array: [*original(self, array)[:-1], np.zeros_like(array)],
    )


def _forget_the_other_nodes(patch: Patch) -> None:
    original = NodeShared.__init__

    def init(self: NodeShared, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self.peers = self.node.split(self.node.rank)  # type: ignore[assignment]

    patch.setattr(NodeShared, "__init__", init)


def _count_every_node(patch: Patch) -> None:
    patch.setattr(NodeShared, "sum_of_squares", lambda self: sum(self._squares.values()))


def _forget_the_norms_of_other_time_shards(patch: Patch) -> None:
    patch.setattr(NodeShared, "_sum_over_mesh", lambda self, part, piece: 0.0)


BUGS: dict[str, tuple[Callable[[Patch], None], Layout, list[int]]] = {
    "a rank left out": (_forget_a_rank, Layout(dp=2), [0, 0]),
    "a node left out": (_forget_the_other_nodes, Layout(dp=4), [0, 0, 1, 1]),
    "norm counted on every node": (_count_every_node, Layout(dp=4), [0, 0, 1, 1]),
    "sequence-parallel norms not summed": (
        _forget_the_norms_of_other_time_shards,
        Layout(dp=2, tp=2, sp=True),
        [0] * 4,
    ),
}


@pytest.mark.parametrize("name", list(BUGS))
def test_planted_bug_is_caught(name: str, monkeypatch: Patch) -> None:
    plant, layout, nodes = BUGS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        found = train("gpt2", layout, steps=2, nodes=nodes, node_shared="on")
        assert_same(found, reference("gpt2", steps=2), 1e-10)
