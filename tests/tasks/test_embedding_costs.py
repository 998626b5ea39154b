"""Sentence embeddings before a run begins: texts of an example, memory, bytes, refused batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_embedders import BATCH, CONTEXT, as_embedder, texts
from training_helpers import VOCAB, Layout, make_config

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.models.embedder import EmbedderOptions
from minillm.replication.methods import payload
from minillm.tasks.embedding import OBJECTIVE, Embedding, EmbeddingOptions
from minillm.training import joint_loss
from minillm.training.assembly import layout_of
from minillm.training.config import RunConfig
from minillm.training.costs import data_axis
from minillm.training.memory import predicted
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import Trainer


@pytest.mark.slow
def test_generated_data_are_pairs() -> None:
    held: Any = OBJECTIVE.load(EmbeddingOptions(), EmbedderOptions(), None, SelfCommunicator())
    assert len(held.train) == 9000 and len(held.held_out) == 1000
    assert held.decides(45) == {"pooling": "mean", "texts": 2}


def test_the_file_says_how_many_texts_an_example_has(tmp_path: Path) -> None:
    """Read pairs and triplets; --texts may only repeat it."""
    for k in (2, 3):
        name, shape = str(tmp_path / f"{k}.tsv"), EmbedderOptions()
        head = "\t".join(("anchor", "positive", "negative")[:k])
        rows = ["\t".join(f"word{i} side{role}" for role in range(k)) for i in range(20)]
        Path(name).write_text("\n".join([head, *rows]) + "\n")
        options = EmbeddingOptions(train=name, tokenizer="char")
        held: Any = OBJECTIVE.load(options, shape, None, SelfCommunicator())
        assert held.decides(4)["texts"] == k
        wrong = EmbedderOptions(texts=5 - k)
        with pytest.raises(ConfigError, match=f"--texts {5 - k}, but .* has {k} texts; use"):
            OBJECTIVE.load(options, wrong, None, SelfCommunicator())


def test_memory_is_that_of_an_encoder_with_all_texts_as_rows() -> None:
    """Predict an embedder of 4 examples and its encoder of 4 k texts."""

    def kinds(config: ResolvedConfig) -> dict[str, int]:
        return predicted(config, layout_of(config), 0).kinds

    for k in (2, 3):
        found = kinds(as_embedder(make_config("bert", Layout(), batch=4), texts=k))
        rows = kinds(make_config("bert", Layout(), batch=4 * k, objective="mlm"))
        assert found["activations"] == rows["activations"] > 0


@pytest.mark.parametrize(
    ("k", "batch", "options", "words"),
    [
        (2, 1, {}, "--batch 1 makes steps of 1 example.*--batch 2 or more"),
        (2, 4, {"local_steps": 2}, "--batch 4 leaves 1 .* 4 workers that --local-steps 2 .*tch 8"),
        (2, 4, {"server": "async"}, "--batch 4 leaves 1 .* 4 workers that --server async "),
        (2, 3, {"server": "stale", "servers": 1}, "leaves 1 .* 3 workers that --server stale .* 6"),
        (2, 8, {"local_steps": 2}, ""),
        (2, 4, {"server": "sync"}, ""),
        (2, 4, {"zero": 2}, ""),
        (3, 4, {"local_steps": 2}, ""),  # a hard negative of its own
    ],
    ids=str,
)
def test_workers_without_negatives_are_refused(
    k: int, batch: int, options: dict[str, Any], words: str
) -> None:
    config = RunConfig.of("embedder")().replace(texts=k, batch=batch, **options)
    ranks = 1 if batch == 1 else 4
    if not words:
        resolve(config, ranks, VOCAB)
        return
    with pytest.raises(ConfigError, match=words):
        resolve(config, ranks, VOCAB)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2),
        pytest.param(Layout(dp=2, tp=2, pp=2, num_microbatches=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_ledger_counts_the_candidates_of_all_replicas(layout: Layout, symmetric: bool) -> None:
    """Compare the bytes of two steps with (k - 1) N D numbers each way, and N D for symmetry.

    Nothing else moves on that axis, and nothing of the loss on dp: it has the gradients alone.
    """
    k, width, item, steps = 3, 32, 8, 2
    task = Embedding(texts(k=k), CONTEXT, BATCH, 7, 0, True)
    config = as_embedder(make_config("bert", layout), symmetric=symmetric)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, task)
        for step in range(steps):
            trainer.step(step)
        found = ledger().payload()
        sent = {name: count for (axis, name), count in found.items() if axis == joint_loss.AXIS}
        of_dp = {key: count for key, count in found.items() if key[0] == "dp"}
        assert of_dp == payload(data_axis(trainer), steps)
        return sent, trainer.mesh.coord("pp") == layout.pp - 1

    numbers = (k - 1 + symmetric) * BATCH * width * steps
    expected = {"all_gather": numbers * item, "reduce_scatter": numbers * item}
    for sent, last in run_ranks(layout.num_ranks, rank):
        assert sent == (expected if last else {})
