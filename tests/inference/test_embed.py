"""Embeddings: their plain definition on every mesh; and runs that start from a bare encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minillm
from minillm import checkpoint, evaluate, train
from minillm.autograd.tape import no_grad
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.inference import embed
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint
from minillm.layout.mesh_shape import MeshShape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.training.assembly import assemble
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve

LINES = ["to be", "", "or not to be, that is the question", "a", "xy " * 9, "é", "whether 'tis"]
SIZES = dict(layers=4, heads=2, dim=16, context=24, vocab=260)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """Make a run of a bare encoder with random weights, and lines to embed."""
    made = save(tmp_path / "encoder")
    (tmp_path / "lines").write_text("\n".join(LINES), encoding="utf-8")
    return made


def save(path: Path, **options: Any) -> Path:
    values = dict(model="bert", objective="none", dtype="float64", tokenizer="byte")
    config = resolve(RunConfig.from_dict(values | SIZES | options), 1, 260)
    comm = SelfCommunicator()
    record = checkpoint.RunRecord(
        config=config.saved_values(),
        tokenizer={"kind": "special", "base": {"kind": "byte"}, "documents": False},
        vocab=260,
        corpus="",
        source="nothing",
        key={},
    )
    checkpoint.save(
        path / checkpoint.SUBFOLDER,
        world=comm,
        mesh_shape=MeshShape(),
        coords=MeshShape().coords(0),
        tensors=list(assemble(config, comm, std=0.5).weights()),
        meta=record.to_json(),
        step=0,
        keep=1,
    )
    return path


def plain(path: Path, pooling: str = "mean") -> np.ndarray:
    """Return the embedding of each line by itself: ids of bytes between 257 and 258, no padding."""
    comm = SelfCommunicator()
    opened = open_checkpoint(str(path), comm)
    model: Any = load_trained(opened, opened.resolve(ReadOptions(), 1), comm).stages[0].model
    found = []
    for line in LINES:
        ids = np.array([[257, *line.encode()[:22], 258]])
        arrays = {"tokens": ids, "types": np.zeros_like(ids)}
        batch = Batch(arrays, {}, Where(0, np.arange(1), np.arange(ids.shape[1])))
        with no_grad():
            hidden = model.forward((), batch, False).outputs[0].data[0]
        pooled = hidden[0] if pooling == "cls" else hidden.sum(0) / len(hidden)
        found.append(pooled / np.sqrt((pooled**2).sum()))
    return np.array(found)


def rows(text: str) -> tuple[list[str], np.ndarray]:
    found = [json.loads(line) for line in text.splitlines()]
    return [each["text"] for each in found], np.array([each["embedding"] for each in found])


@pytest.mark.parametrize(
    ("ranks", "words"),
    [(1, ["--pooling", "cls"]), (1, []), (2, ["--tp", "2"]), (4, ["--pp", "2"]), (3, [])],
)
def test_lines_are_embedded_in_order(
    ranks: int, words: list[str], encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On dp 3 and on dp 2 times pp 2 the batches of two lines are dealt to the replicas."""
    argv = [str(encoder), "--input", str(encoder.parent / "lines"), "--batch", "2", *words]
    args = embed._parse(argv)

    def rank(comm: Communicator) -> None:
        embed._embed(comm, args)

    run_ranks(ranks, rank)
    out, err = capsys.readouterr()
    texts, found = rows(out)
    assert texts == LINES
    np.testing.assert_allclose(found, plain(encoder, args.pooling), rtol=0, atol=1e-6)
    assert err == "note: 2 lines of 7 had more than 24 tokens, of which the first were read\n"


def test_texts_are_embedded_in_python(encoder: Path) -> None:
    model: Any = minillm.load(str(encoder))
    found = model.embed(LINES, batch=3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain(encoder), rtol=0, atol=1e-6)
    assert model.embed([]).shape == (0, 16)
    with pytest.raises(ConfigError, match="pooling 'max' is not known; it can be mean or cls"):
        model.embed(LINES, pooling="max")


def test_bad_input_is_one_message(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, lines = encoder.parent, str(encoder.parent / "lines")
    (folder / "latin").write_bytes(b"caf\xe9\n")
    for words, message in (
        ([str(encoder), "--input", str(folder / "none")], "none is no file; name a text with"),
        ([str(encoder), "--input", str(folder / "latin")], "latin is not UTF-8"),
        ([str(encoder), "--input", lines, "--context", "25"], "longer than the 24 positions"),
        ([str(folder), "--input", lines], str(folder)),
    ):
        assert embed.main(words) in (1, 2)
        out, err = capsys.readouterr()
        assert message in err and not out and err.count("\n") == 1


def test_a_bare_encoder_has_no_loss_and_begins_one(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a run of another objective gives the head initial values, and says so."""
    text, folder = encoder.parent / "text.txt", encoder.parent
    text.write_text("To be, or not to be: that is the question.\n" * 40)
    words = ["--init-from", str(encoder), "--data", str(text), "--batch", "2", "--steps", "1"]
    assert train.main([*words, "--out", str(folder / "none")]) != 0
    assert "train one with --objective mlm" in capsys.readouterr().err
    assert evaluate.main([str(encoder), "--data", str(text)]) != 0
    assert "train one with --objective mlm" in capsys.readouterr().err
    words += ["--objective", "mlm", "--lr", "1e-30", "--out", str(folder / "run")]
    assert train.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("initial values for head, which these weights do not have") == 1
    before = checkpoint.CheckpointSource(encoder / "checkpoints" / "step-00000000")
    after = checkpoint.CheckpointSource(folder / "run" / "checkpoints" / "step-00000001")
    for name in after.names():
        if not name.startswith("model/"):
            continue
        every = tuple(slice(0, n) for n in after.shape(name))
        value = after.read(name, every)
        if name.startswith("model/head."):
            assert name.endswith("dense.weight") == (0.01 < value.std() < 0.03)
        else:
            np.testing.assert_allclose(value, before.read(name, every), rtol=1e-12, atol=1e-29)
