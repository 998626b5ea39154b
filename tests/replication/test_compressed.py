"""Compressed gradients in training: layouts, bytes, memory, checkpoints, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY, load_trainer, save_trainer, state_pieces
from replication.virtual_workers import simulate_compressed
from training_helpers import (
    INIT_STD,
    Layout,
    assemble,
    assert_same,
    compare,
    make_batches,
    make_config,
    make_task,
    pieces,
    reference,
    train,
)

from minillm import checkpoint
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.params.storage import PrivateMemory
from minillm.replication.codecs import Codec, OneBit, PowerSGD, TopK
from minillm.replication.compressed import Compressed
from minillm.tasks.language_model import LanguageModeling
from minillm.training.assembly import layout_of
from minillm.training.memory import predicted
from minillm.training.optim import SGD
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite

MAKE: dict[str, Callable[[], Codec]] = {
    "powersgd": lambda: PowerSGD(2, seed=5),
    "topk": lambda: TopK(0.1),
    "onebit": OneBit,
}
METHODS: list[dict[str, Any]] = [
    {"compress": "bf16"},
    {"compress": "powersgd", "compress_rank": 2},
    {"compress": "topk", "compress_share": 0.2},
    {"compress": "onebit"},
]


class Watched(Codec):
    """A codec that adds up what it is given and what it returns."""

    def __init__(self, inner: Codec, totals: dict[Any, Any], key: Any) -> None:
        self.inner, self.totals, self.key = inner, totals, key
        self.takes, self.start = inner.takes, inner.start  # type: ignore[method-assign]

    def sum_(self, matrices: Any, comm: Communicator) -> None:
        given = [m.grad.copy() for m in matrices]
        self.inner.sum_(matrices, comm)
        for matrix, grad in zip(matrices, given, strict=True):
            key = (matrix.name, *self.key)
            before = self.totals.get(key, (0.0, 0.0))
            server = matrix.private.get("server", np.zeros(0))
            self.totals[key] = (before[0] + grad, before[1] + matrix.grad, matrix.error, server)


LAYOUTS = [
    Layout(dp=2, tp=2, sp=True),
    Layout(dp=2, pp=2, num_microbatches=2),
    Layout(dp=2, tp=2, pp=2, num_microbatches=2),
]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if i == j else pytest.mark.matrix)
        for i, name in enumerate(MAKE)
        for j, layout in enumerate(LAYOUTS)
    ],
    ids=str,
)
def test_nothing_is_lost_in_training(name: str, layout: Layout) -> None:
    """Check the sums over all steps of a run with cut and with tied weights."""
    totals: dict[Any, Any] = {}

    def replicate(mesh: Any, placement: Any) -> Compressed:
        key = (mesh.coord("pp"), mesh.coord("tp"), mesh.coord("dp"))
        watched = Watched(MAKE[name](), totals, key)
        return Compressed(mesh, placement, PrivateMemory(), watched)

    train("llama-tied", layout, steps=3, options={"replicate": replicate})
    assert len(totals) >= 4 * 2 * layout.num_ranks // layout.pp
    for matrix, pp, tp, dp in totals:
        if dp:
            continue
        workers = [totals[matrix, pp, tp, worker] for worker in range(layout.dp)]
        servers = np.concatenate([worker[3] for worker in workers])
        applied, size = workers[0][1], workers[0][1].size
        rest = sum(w[2] for w in workers) + (
            servers[:size].reshape(applied.shape) if servers.size else 0.0
        )
        given = sum(w[0] for w in workers)
        np.testing.assert_allclose(applied + rest, given, rtol=0, atol=1e-12 * np.abs(given).max())


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda m: m["compress"])
def test_padding_of_the_vocabulary_never_moves(method: dict[str, Any]) -> None:
    """Cut 29 tokens over two ranks: norm and weights are those without the row that is padding."""
    layout, steps = Layout(dp=2, tp=2), 3
    config = make_config("gpt2-untied", layout, dropout=0.0, **method)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, make_task(config), std=INIT_STD, optimizer=SGD)
        norms = [trainer.step(step).grad_norm for step in range(steps)]
        tables = [p.get() for p in trainer.model.buffers[0].parameters if p.spec.pad]
        assert len(tables) == 2 and all(len(table) == 15 for table in tables)
        padding = [table[14:] for table in tables] if trainer.mesh.coord("tp") else []
        return norms, pieces(trainer, "value"), [np.abs(row).max() for row in padding]

    found = run_ranks(4, rank)
    norms, weights = simulate_compressed(layout, steps, "sgd", "gpt2-untied", dropout=0.0, **method)
    for own, _, padding in found:
        np.testing.assert_allclose(own, norms, rtol=1e-10)
        assert padding in ([], [0, 0])
    compare(assemble([each for _, each, _ in found]), weights, 1e-10, "weights")


@pytest.mark.parametrize("layout", [Layout(dp=4), Layout(dp=2, pp=2, num_microbatches=2)], ids=str)
def test_powersgd_equals_one_rank(layout: Layout) -> None:
    method = {"compress": "powersgd", "compress_rank": 2}
    expected = reference("gpt2", "sgd", 3, tuple(method.items()))
    assert_same(train("gpt2", layout, steps=3, **method), expected, 1e-9)


def test_a_wire_of_16_bits_trains_like_all_reduce() -> None:
    expected = reference("gpt2", "adamw")
    found = train("gpt2", Layout(dp=2, tp=2, sp=True), optimizer="adamw", compress="bf16")
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-3)
    assert found.losses != expected.losses


def payload(method: dict[str, Any], shapes: list[tuple[int, ...]], d: int, item: int) -> Any:
    """Return the payload of a step by operation, by formula."""
    name = method["compress"]
    rank = method.get("compress_rank", 0)

    def taken(shape: tuple[int, ...]) -> bool:
        big = len(shape) == 2 and math.prod(shape) >= 256
        return name == "bf16" or (big and rank * sum(shape) < math.prod(shape))

    matrices = [shape for shape in shapes if taken(shape)]
    sizes = [math.prod(shape) for shape in matrices]
    dense = sum(math.prod(shape) for shape in shapes if not taken(shape)) * item
    found = {"all_reduce": dense}
    if name == "bf16":
        found = {"all_to_all": 2 * sum(sizes), "all_gather": 2 * sum(sizes)}
    elif name == "powersgd":
        found["all_reduce"] += rank * sum(map(sum, matrices)) * item
    elif name == "topk":
        count = sum(math.ceil(method["compress_share"] * size) for size in sizes)
        found["all_gather"] = d * count * (item + 4)
    else:
        bits = sum(math.ceil(size / (8 * d)) * d for size in sizes)
        found["all_to_all"] = found["all_gather"] = bits + d * item * len(sizes)
    return found


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["compress"])
def test_bytes_sent(method: dict[str, Any], d: int) -> None:
    config = make_config("gpt2-untied", Layout(dp=d), batch=12, vocab=32, **method)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        trainer.step(0)
        before = {key: row.bytes for key, row in ledger().rows.items() if key[2] == "payload"}
        trainer.step(1)
        shapes = [parameter.spec.shape for parameter in trainer.model.buffers[0].parameters]
        return {
            key[1]: row.bytes - before[key]
            for key, row in ledger().rows.items()
            if key[2] == "payload"
        }, shapes

    for sent, shapes in run_ranks(d, rank):
        assert sent == payload(method, shapes, d, item=8)


def test_memory_is_predicted() -> None:
    plain = make_config("gpt2", Layout(dp=2))
    for method in METHODS:
        config = make_config("gpt2", Layout(dp=2), **method)
        more = [predicted(c, layout_of(c), 0).kinds["gradients"] for c in (config, plain)]
        factor = {"bf16": 1, "onebit": 2.5}.get(method["compress"], 2)
        assert more[0] == pytest.approx(factor * more[1], rel=1e-6)


# ---- state


def run(
    comm: Communicator,
    layout: Layout,
    steps: range,
    start: Path | None,
    end: Path | None,
    **kw: Any,
) -> Any:
    config = make_config("gpt2", layout, **(TINY | {"dim": 32, "ffn_dim": 48}), **kw)
    trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
    lost: list[str] = []
    if start is not None:
        source = checkpoint.CheckpointSource(start)
        lost = checkpoint.fallbacks(source, trainer.state())
        load_trainer(trainer, start)
    for step in steps:
        trainer.step(step)
    if end is not None:
        save_trainer(trainer, end, steps.stop)
    return state_pieces(trainer), lost


def resume(tmp_path: Path, method: dict[str, Any]) -> None:
    layout, ranks = Layout(dp=2, pp=2, num_microbatches=2), 4
    whole = run_ranks(ranks, lambda c: run(c, layout, range(4), None, None, **method))
    run_ranks(ranks, lambda c: run(c, layout, range(2), None, tmp_path, **method))
    path = tmp_path / "step-00000002"
    again = run_ranks(ranks, lambda c: run(c, layout, range(2, 4), path, None, **method))
    a, b = (assemble([state for state, _ in found], 0.0) for found in (whole, again))
    assert a.keys() == b.keys() and again[0][1] == []
    assert method["compress"] == "bf16" or any(np.any(a[n]) for n in a if "/error/" in n)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["compress"])
def test_resume_keeps_the_memory_bit_for_bit(tmp_path: Path, method: dict[str, Any]) -> None:
    resume(tmp_path, method)


def test_forgotten_state_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compressed, "state", lambda self: iter(()))
    with pytest.raises(AssertionError):
        resume(tmp_path, METHODS[2])


def test_memory_moves_to_another_tp_and_pp_but_not_dp(tmp_path: Path) -> None:
    method = METHODS[2]
    old = Layout(dp=2, tp=2)
    saved = run_ranks(4, lambda c: run(c, old, range(2), None, tmp_path, **method))
    path = tmp_path / "step-00000002"
    expected = assemble([state for state, _ in saved], 0.0)
    for layout in (Layout(dp=2), Layout(dp=2, pp=2, num_microbatches=2)):
        found = run_ranks(
            layout.num_ranks, lambda c, to=layout: run(c, to, range(0), path, None, **method)
        )
        moved = assemble([state for state, _ in found], 0.0)
        assert found[0][1] == []
        for name, value in expected.items():
            np.testing.assert_array_equal(moved[name], value, err_msg=name)
    for changes, words in (
        ({"layout": Layout(dp=4)}, ["error memory of compressed gradients begins at zero"]),
        ({"compress": "onebit"}, ["error memory of summed signs begins at zero"]),
        ({"compress": "none"}, []),
    ):
        layout = changes.pop("layout", Layout(dp=2))
        kw = method | changes
        if kw["compress"] != "topk":
            del kw["compress_share"]
        found = run_ranks(
            layout.num_ranks, lambda c, to=layout, k=kw: run(c, to, range(2, 3), path, None, **k)
        )
        assert len(found[0][1]) == len(words)
        assert all(word in text for word, text in zip(words, found[0][1], strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["compress"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_stop_every_rank(method: dict[str, Any], bad: float) -> None:
    """Check that one worker's NaN ends the run everywhere, and that the memory is not saved."""
    config = make_config("gpt2", Layout(dp=2), **TINY, **method)

    def rank(comm: Communicator) -> list[str]:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        reduce, (buffers,) = trainer.replication.reduce, trainer.model.buffers
        span = next(s for s in buffers.layout.spans() if "qkv.weight" in s.parameter.name)

        def spoilt(stage: int) -> None:
            if comm.rank == 1:
                buffers.grads[span.start + 3] = bad
            reduce(stage)

        trainer.replication.reduce = spoilt  # type: ignore[method-assign]
        with pytest.raises(NotFinite):
            trainer.step(0)
        return [t.name for t in trainer.state() if t.name.startswith("compress/")]

    with np.errstate(all="ignore"):
        assert run_ranks(2, rank) == [[], []]
