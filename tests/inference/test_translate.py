"""Translation: caches change nothing, on any mesh, and rows may be reordered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models.seq2seq_helpers import PAIRS, options
from training_helpers import BASE, VOCAB, Layout, make_config

from minillm.base.device import CPU
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.tokenizers import CharTokenizer
from minillm.inference.scores import Scores
from minillm.inference.translate import encoded_lines
from minillm.inference.translator import Targets, Translator
from minillm.models.seq2seq import FAMILY
from minillm.training.assembly import assemble

ROWS = np.arange(5)
SOURCES = [PAIRS.sources[row] for row in ROWS]


def on_ranks(layout: Layout, work: Callable[[Translator], Any], model: str = "pre") -> list[Any]:
    """Return what `work` does with a translator of untrained weights, on each rank."""
    config = dataclasses.replace(
        make_config("gpt2-untied", layout), family=FAMILY, model=options(model).resolve(VOCAB)
    )

    def rank(comm: Communicator) -> Any:
        return work(Translator(assemble(config, comm, training=False, std=0.25), VOCAB - 1))

    return run_ranks(layout.num_ranks, rank)


def teacher_forced(translator: Translator) -> np.ndarray:
    """Return the logits [B, T, V] of the targets of `ROWS`, in one pass without a cache."""
    batch = PAIRS.batch(ROWS, BASE["context"], (0, ROWS), 1.0, CPU)._replace(divisors={})
    (model,) = translator.models.values()
    return model.logits(model.forward((), batch, False).outputs, batch)


def stepped(translator: Translator) -> np.ndarray | None:
    """Return the same logits token by token."""
    rows = Targets(translator, SOURCES)
    found = [gathered(rows)]
    for time in range(max(len(PAIRS.targets[row]) for row in ROWS) - 1):
        ids = [(PAIRS.targets[row].tolist() + [PAIRS.end] * 99)[time] for row in ROWS]
        rows.go_on(ROWS.tolist(), ids)
        found.append(gathered(rows))
    return None if found[0] is None else np.stack([each for each in found if each is not None], 1)


def gathered(rows: Targets) -> np.ndarray | None:
    """Return the scores of the next tokens, whole [B, V]."""
    scores = rows.scores()
    return (
        None if scores is None else scores.comm.all_gather(scores.values, dim=1, sizes=cut(scores))
    )


def cut(scores: Scores) -> list[int]:
    """Return the number of ids of each rank."""
    return scores.comm.all_gather(np.array([scores.values.shape[1]])).tolist()


def greedy(translator: Translator) -> list[list[int]]:
    return translator.translate(SOURCES)


@pytest.mark.parametrize("model", ["pre", "post"])
def test_cached_logits_are_those_of_one_pass(model: str) -> None:
    (whole,), (found,) = (on_ranks(Layout(), f, model) for f in (teacher_forced, stepped))
    for row in ROWS:
        size = len(PAIRS.targets[row])
        np.testing.assert_allclose(found[row, :size], whole[row, :size], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", [Layout(pp=4), Layout(tp=2, pp=2)], ids=str)
def test_every_mesh_writes_the_same(layout: Layout) -> None:
    (expected,) = on_ranks(Layout(), stepped)
    for found in on_ranks(layout, stepped)[-layout.tp :]:  # ranks of the last stage
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    (texts,) = on_ranks(Layout(), greedy)
    assert on_ranks(layout, greedy) == [texts] * layout.num_ranks and any(texts)


def test_greedy_takes_the_likeliest_token_of_one_pass() -> None:
    def check(translator: Translator) -> None:
        found = translator.translate(SOURCES)
        (model,) = translator.models.values()
        for source, ids in zip(SOURCES, found, strict=True):
            assert translator.translate([source]) == [ids]  # whatever its batch
            batch = PAIRS.batch(ROWS[:1], BASE["context"], (0, ROWS[:1]), 1.0, CPU)
            arrays = {"source": source[None], "target": np.array([[PAIRS.end, *ids]])}
            where = dataclasses.replace(batch.where, times=np.arange(len(ids) + 1))
            batch = batch._replace(arrays=arrays, divisors={}, where=where, memory=None)
            likeliest = model.logits(model.forward((), batch, False).outputs, batch).argmax(-1)
            ended = [] if len(ids) == translator.context - 1 else [PAIRS.end]
            assert likeliest[0, : len(ids + ended)].tolist() == ids + ended

    on_ranks(Layout(), check)


def test_rows_are_reordered_by_parent() -> None:
    parents = [3, 3, 0, 1]

    def reordered(translator: Translator) -> Any:
        rows = Targets(translator, SOURCES)
        rows.scores()
        rows.go_on(range(5), range(5))
        rows.scores()
        rows.go_on(parents, range(4))
        return gathered(rows)

    def straight(translator: Translator) -> Any:
        rows = Targets(translator, [SOURCES[row] for row in parents])
        rows.scores()
        rows.go_on(range(4), parents)
        rows.scores()
        rows.go_on(range(4), range(4))
        return gathered(rows)

    (found,), (expected,) = on_ranks(Layout(), reordered), on_ranks(Layout(), straight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_lines_that_cannot_be_read_are_named() -> None:
    tokenizer = CharTokenizer("abc")
    assert [ids.tolist() for ids in encoded_lines(["ab", ""], tokenizer, 8)] == [[0, 1, 3], [3]]
    with pytest.raises(ConfigError, match="line 2: character 'x'"):
        encoded_lines(["ab", "axb"], tokenizer, 8)
    with pytest.raises(ConfigError, match="line 1 has 8 tokens, and the model reads 7"):
        encoded_lines(["abcabcab"], tokenizer, 8)
