"""Adapted runs as a user has them: start from weights, go on, measure, predict, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import lines_of

from minillm import evaluate, finetune, train
from minillm.base.log import compact
from minillm.checkpoint import CheckpointSource, find
from minillm.data.labelled import opinions
from minillm.inference import predict
from minillm.weights import exporting
from minillm.weights.foreign import Foreign
from minillm.weights.origin import source_of

TINY = ["--layers", "2", "--heads", "2", "--dim", "16", "--context", "24", "--batch", "8"]
TINY += ["--lr", "3e-3", "--threads", "1", "--dtype", "float64"]


def tensors(source: Any) -> dict[str, np.ndarray]:
    """Return the weights of a source by name."""
    names = [name for name in source.names() if name.startswith("model/")]
    return {
        name: source.read(name, tuple(slice(0, size) for size in source.shape(name)))
        for name in names
    }


@pytest.mark.slow
def test_a_decoder_with_low_rank_updates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = str(tmp_path / "base"), tmp_path / "run"
    words = ["--steps", "6", "--sample-tokens", "0", "--eval-tokens", "2000", *TINY]
    words += ["--data", "austen", "--tokenizer", "char", "--bias", "none"]
    words += ["--norm", "rmsnorm", "--mlp", "swiglu", "--position", "rotary", "--ffn-dim", "40"]
    assert train.main([*words, "--out", base]) == 0
    words = ["--init-from", base, "--lora", "2", "--lora-alpha", "9", *words, "--weight-decay", "1"]
    assert train.main([*words, "--out", str(run), "--stop-after", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    # Two layers of rank 2: (16 + 48) + (16 + 16) + (16 + 80) + (40 + 16) rows and columns.
    assert f"parameters, of which {compact(2 * 2 * 248)} train" in shown
    assert train.main(["--resume", str(run), "--lora", "3"]) == 1
    assert "cannot change --lora 3 (was 2)" in capsys.readouterr().err
    assert train.main(["--resume", str(run), "--stop-after", "6"]) == 0
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    found, expected = lines_of(run), lines_of(tmp_path / "whole")
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]

    held, before = CheckpointSource(find(run)), tensors(CheckpointSource(find(Path(base))))
    raw, merged = tensors(held), tensors(source_of(find(run)))
    assert merged.keys() == before.keys() < raw.keys()
    states = [name for name in held.names() if name.startswith("optimizer/")]
    assert states and all(".lora." in name for name in states)
    for name, value in before.items():
        assert np.array_equal(raw[name], value), f"{name} is frozen"
        layer = name.removesuffix(".weight")
        if f"{layer}.lora.a" in raw:
            value = value + 9 / 2 * raw[f"{layer}.lora.b"] @ raw[f"{layer}.lora.a"]
        np.testing.assert_allclose(merged[name], value, rtol=0, atol=1e-14)

    capsys.readouterr()  # the run has measured itself with factors, this is the merged model
    assert evaluate.main([str(run), "--tokens", "2000", "--threads", "1"]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert loss == pytest.approx(found[-1]["val_loss"], rel=1e-12)
    assert exporting.main([str(run), "--out", str(tmp_path / "hf")]) == 0
    back = tensors(Foreign(tmp_path / "hf").source("float64"))
    for name, value in merged.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-6, atol=1e-7)
    again = ["--init-from", str(run), "--steps", "1", "--sample-tokens", "0", "--threads", "1"]
    assert train.main([*again, "--freeze", "layers:1", "--out", str(tmp_path / "next")]) == 0
    kept = tensors(CheckpointSource(find(tmp_path / "next")))
    for name in ("model/blocks.0.mlp.up.weight", "model/embedding.weight"):
        assert np.array_equal(kept[name], merged[name]) == (".0." in name)


@pytest.mark.slow
def test_an_encoder_with_low_rank_updates_predicts_as_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(each.texts[0], each.label) for each in opinions()[:60]]
    data = tmp_path / "train.tsv"
    data.write_text("\n".join(["text\tlabel", *("\t".join(row) for row in rows)]) + "\n")
    words = ["--task", "classify", "--train", str(data), "--dev", str(data), *TINY, "--steps", "4"]
    assert finetune.main([*words, "--out", str(tmp_path / "base")]) == 0
    words += ["--model", str(tmp_path / "base"), "--lora", "4", "--layer-decay", "0.5"]
    assert finetune.main([*words, "--freeze", "pairs", "--out", str(tmp_path / "run")]) == 0
    before, after = (tensors(CheckpointSource(find(tmp_path / name))) for name in ("base", "run"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"model/classifier.weight", "model/classifier.bias"}
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run"), "--data", str(data), "--threads", "1"]) == 0
    measured = lines_of(tmp_path / "run")[-1]
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["loss"] == pytest.approx(measured["val_loss"], rel=1e-12)
    assert predict.main([str(tmp_path / "run"), "--input", str(data), "--threads", "1"]) == 0
    shares = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = [row["label"] for row in shares]
    right = np.mean([label == row[1] for label, row in zip(labels, rows, strict=True)])
    assert right == pytest.approx(measured["val_accuracy"], abs=1e-12)
