"""Sentence embeddings: one answer on every mesh, the plain definition, and planted bugs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_embedders import BATCH, CONTEXT, as_embedder, texts, tokenizer
from training_helpers import VOCAB, Layout, Outcome, assert_same, make_config, train

from minillm.autograd.tape import no_grad
from minillm.base.device import CPU
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.data.related_texts import RelatedFields
from minillm.inference.embedder import Embedder
from minillm.inference.predict import predicted
from minillm.models import embedder
from minillm.nn import ranking
from minillm.params.where import Where
from minillm.tasks.embedding import Embedding
from minillm.tasks.embedding_metrics import HeldOutRelated, RetrievalEvaluation, ScoreEvaluation
from minillm.tasks.embedding_predictor import EmbeddingPredictor
from minillm.tasks.encoded_related import EncodedRelated
from minillm.training import joint_loss
from minillm.training.assembly import assemble
from minillm.training.held_out import measure
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import Trainer

SLOW = pytest.mark.slow
LAYOUTS = [
    Layout(dp=2, pp=2, num_microbatches=2),
    *(
        pytest.param(layout, marks=SLOW)
        for layout in (
            Layout(dp=2),
            Layout(dp=4),
            Layout(dp=2, tp=2),
            Layout(tp=2),
            Layout(tp=2, sp=True),
            Layout(pp=2),
            Layout(num_microbatches=4),
            Layout(dp=4, num_microbatches=4),
            Layout(pp=2, num_microbatches=4, schedule="gpipe"),
            Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2),
        )
    ),
]


def trained(layout: Layout, k: int = 3, shape: Any = None, **changes: Any) -> Outcome:
    options = {"task": Embedding(texts(k=k), CONTEXT, BATCH, 7, 0, True)}
    adapt = functools.partial(as_embedder, **(shape or {}))
    return train("bert", layout, steps=3, options=options, adapt=adapt, **changes)


course = functools.cache(trained)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_answer(layout: Layout) -> None:
    assert_same(course(layout), course(Layout()), 1e-11)


@SLOW
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("number", [1, 2])
def test_one_answer_with_sharded_state(zero: int, number: int) -> None:
    layout = Layout(dp=2, num_microbatches=number)
    assert_same(trained(layout, zero=zero), course(Layout()), 1e-11)


@SLOW
@pytest.mark.parametrize("shape", [{"pooling": "cls"}, {"symmetric": True, "scale": 5.0}], ids=str)
@pytest.mark.parametrize(
    "layout", [Layout(dp=2, tp=2, sp=True), Layout(dp=2, pp=2, num_microbatches=2)], ids=str
)
def test_one_answer_of_other_settings(layout: Layout, shape: dict[str, Any]) -> None:
    found, expected = trained(layout, 2, shape), trained(Layout(), 2, shape)
    assert_same(found, expected, 1e-11)
    assert abs(expected.losses[0] - course(Layout(), 2).losses[0]) > 1e-3


@SLOW
def test_workers_that_update_alone_compare_their_own_examples() -> None:
    """Take a local step of two workers: its loss is the mean of those of their shares."""
    task = Embedding(texts(), CONTEXT, BATCH, 7, 0, True)
    config = as_embedder(make_config("bert", Layout(dp=2), local_steps=2))

    def rank(comm: Communicator) -> float:
        return Trainer(config, comm, task, std=0.25).step(0).loss

    stage = stage_of()
    with no_grad():
        shares = [task.batch(0, np.arange(rank, BATCH, 2), CPU) for rank in range(2)]
        losses = [stage.forward((), batch, True).losses["loss"].data for batch in shares]
    expected = pytest.approx(float(sum(losses)), rel=1e-12)
    assert run_ranks(2, rank) == [expected, expected]


# The plain definition.


def stage_of(**more: Any) -> Any:
    config = as_embedder(make_config("bert", Layout()), **more)
    return assemble(config, SelfCommunicator(), std=0.25).stages[0].model


def plain_vectors(stage: Any, held: EncodedRelated, pooling: str = "mean") -> np.ndarray:
    """Return the vector of each text, computed by itself without padding."""
    found = []
    for ids in held.texts.ids:
        arrays = {"tokens": ids[None], "types": np.zeros_like(ids[None])}
        where = Where(0, np.arange(1), np.arange(len(ids)))
        batch = held.texts.batch(np.array([0]), CONTEXT, where, {})
        batch = batch._replace(arrays=arrays, where=where, limits=None)
        with no_grad():
            hidden = stage.forward((), batch, False).outputs[0].data[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
        found.append(pooled / np.sqrt((pooled**2).sum()))
    return np.array(found)


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=SLOW)])
def test_loss_is_the_plain_definition(pooling: str) -> None:
    """Rank the positives of 9 examples of unequal lengths in float64, one text at a time."""
    stage, held = stage_of(pooling=pooling), texts()
    vectors, total = plain_vectors(stage, held, pooling), 0.0
    rows = held.rows[:9]
    for i, (anchor, positive, _) in enumerate(rows):
        mine = {positive, anchor} | {p for a, p, _ in rows if a == anchor}
        others = [t for column in (1, 2) for t in rows[:, column] if t not in mine]
        scores = 20 * vectors[[positive, *others]] @ vectors[anchor]
        total += np.log(np.exp(scores).sum()) - scores[0]
        assert len(others) < 17 or i < 6
    batch = held.batch(np.arange(9), CONTEXT, Where(0, np.arange(9)), {"loss": 9.0})
    with no_grad():
        found = stage.forward((), batch, False)
    np.testing.assert_allclose(float(found.losses["loss"].data), total / 9, rtol=1e-12)
    np.testing.assert_allclose(found.outputs[1].data, vectors[rows.T.reshape(-1)], atol=1e-12)


def test_rows_have_addresses_of_their_own() -> None:
    """Share a step between ranks: each text of each example has one address."""
    task = Embedding(texts(), CONTEXT, BATCH, 7, 0, True)
    parts = [task.batch(1, np.arange(rank, BATCH, 4), CPU) for rank in range(4)]
    samples = np.concatenate([part.where.samples for part in parts])
    assert sorted(samples) == list(range(3 * BATCH))
    for part in parts:
        numbers = task.rows(1)[part.where.samples // 3]
        np.testing.assert_array_equal(
            part.arrays["texts"], texts().rows[numbers, part.where.samples % 3]
        )
    assert task.row_lengths(1).sum() == sum(int(p.limits.lengths.sum()) for p in parts if p.limits)


# Measures and predictions.


def on_ranks(layout: Layout, run: Callable[[Any, Communicator, ResolvedConfig], Any]) -> list[Any]:
    config = as_embedder(make_config("bert", layout))
    return run_ranks(
        layout.num_ranks,
        lambda comm: run(assemble(config, comm, training=False, std=0.25), comm, config),
    )


def measured(layout: Layout, scores: bool = False) -> list[Any]:
    what = HeldOutRelated(texts(scores=scores), CONTEXT, 32, 20.0, None)
    return on_ranks(layout, lambda model, comm, _: measure(model, what, comm, 3))


MESHES = [Layout(tp=2, pp=2)]
MESHES += [pytest.param(x, marks=SLOW) for x in (Layout(dp=2), Layout(dp=4), Layout(dp=2, tp=2))]


@pytest.mark.parametrize("scores", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_measures_the_same(layout: Layout, scores: bool) -> None:
    (expected,) = measured(Layout(), scores)
    assert isinstance(expected, ScoreEvaluation if scores else RetrievalEvaluation)
    for found in measured(layout, scores):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
        if scores:
            np.testing.assert_allclose(found.cosines, expected.cosines, rtol=0, atol=1e-13)
        else:
            np.testing.assert_array_equal(found.ranks, expected.ranks)


@SLOW
def test_measures_use_the_vectors_of_all_texts() -> None:
    (found,) = measured(Layout(), scores=True)
    held = texts(scores=True)
    vectors = plain_vectors(stage_of(), held)
    cosines = (vectors[held.rows[:, 0]] * vectors[held.rows[:, 1]]).sum(1)
    np.testing.assert_allclose(found.cosines, cosines, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_predicts_the_same(layout: Layout) -> None:
    """Embed 9 texts, 2 of which are cut, and compare with minillm embed and with cosines."""
    words = np.random.default_rng(4).integers(0, VOCAB - 4, 400).astype(str).tolist()
    lines = [" ".join(words[20 * i : 20 * i + n]) for i, n in enumerate([*range(1, 7), 14, 30, 31])]

    def run(model: Any, comm: Communicator, config: ResolvedConfig) -> Any:
        out = []
        for pairs in (False, True):
            inputs = [(a, b) if pairs else (a,) for a, b in zip(lines, lines[::-1], strict=True)]
            predictor = EmbeddingPredictor(tokenizer(), RelatedFields(pairs=pairs), CONTEXT, 32)
            values = predicted(predictor, inputs, 2, model, comm, CPU)
            out.append(
                [predictor.line(each, row) for each, row in zip(inputs, values, strict=True)]
            )
        rows, cut = Embedder(model, tokenizer().to_json()).texts(lines, 2)
        return [*out, rows, cut]

    ((vectors, cosines, rows, cut),) = on_ranks(Layout(), run)
    found = np.array([line["embedding"] for line in vectors])
    np.testing.assert_allclose(found, rows, rtol=0, atol=1e-7)
    expected = (found * found[::-1]).sum(1)
    np.testing.assert_allclose([line["cosine"] for line in cosines], expected, atol=2e-6)
    assert cut == 2 and cosines[0]["texts"] == [lines[0], lines[-1]]
    for other in on_ranks(layout, run):
        assert other[:2] == [vectors, cosines] and other[3] == 2


# Planted bugs: each is seen by one of the comparisons above.


def test_negatives_of_the_own_rank_alone_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranking.rank
    alone = SelfCommunicator()
    monkeypatch.setattr(ranking, "rank", lambda p, none, comm, rule: rank(p, none, alone, rule))
    with pytest.raises(AssertionError):
        assert_same(trained(Layout(dp=2)), course(Layout()), 1e-11)


@SLOW
def test_negatives_of_the_own_microbatch_alone_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_loss.JointLoss, "_twice", lambda self, batches: batches)
    with pytest.raises(AssertionError):
        assert_same(trained(Layout(num_microbatches=2)), course(Layout()), 1e-11)


@SLOW
def test_dropped_gradient_of_gathered_negatives_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the part of the candidates' gradient that this rank found, as a plain gather does."""

    class Dropping:
        def __init__(self, comm: Communicator) -> None:
            self.comm = comm

        def __getattr__(self, name: str) -> Any:
            return getattr(self.comm, name)

        def reduce_scatter(self, x: Any, dim: int, sizes: Any) -> Any:
            start = sum(sizes[: self.comm.rank])
            return x[start : start + sizes[self.comm.rank]]

    choose = ranking._choose
    monkeypatch.setattr(
        ranking, "_choose", lambda q, c, comm, scale: choose(q, c, Dropping(comm), scale)
    )
    found, expected = trained(Layout(dp=2)), course(Layout())
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-12)
    with pytest.raises(AssertionError):
        assert_same(found, expected, 1e-11)


@SLOW
def test_a_first_pass_without_dropout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = joint_loss.PipelineRuntime
    monkeypatch.setattr(joint_loss, "PipelineRuntime", lambda *a, dropout, **k: runtime(*a, **k))
    with pytest.raises(AssertionError):
        assert_same(trained(Layout(num_microbatches=2)), course(Layout()), 1e-11)


@SLOW
def test_padding_in_the_mean_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide by the padded length: another mesh pads otherwise."""
    mean = embedder.mean_of_time
    monkeypatch.setattr(
        embedder, "mean_of_time", lambda x, p: mean(x, dataclasses.replace(p, limits=None))
    )
    assert abs(trained(Layout(dp=4)).losses[0] - course(Layout()).losses[0]) > 1e-6
