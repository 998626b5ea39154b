"""`minillm bench quality` trains in PyTorch what a run trained here, to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "PyTorch or transformers is not installed; .ci/run installs them for these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from tasks.torch_encoders import bert_config  # noqa: E402

from minillm import finetune  # noqa: E402
from minillm.bench import main  # noqa: E402

WORDS = ["ann", "bath", "bob", "in", "lee", "mill", "saw", "the", "torby", "was", "."]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##n"]
FILES = {"classify": "tsv", "regress": "tsv", "tag": "conll", "qa": "json"}


def sentences(seed: int, number: int = 40) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [rng.choice([*WORDS, "bobs", "lees"], n).tolist() for n in rng.integers(2, 14, number)]


def text_of(task: str, seed: int) -> str:
    """Return a file of examples for a task."""
    rows = sentences(seed)
    if task == "tag":
        tags = {"ann": "B-name", "bob": "B-name", "bobs": "B-name", "bath": "B-place"}
        return "\n".join(
            "".join(f"{word}\t{tags.get(word, 'O')}\n" for word in words) for words in rows
        )
    if task == "qa":
        asked: list[Any] = []
        for number, words in enumerate(rows):
            start = len(" ".join([*words[:1], ""]))
            answer = dict(text=words[1], answer_start=start)
            qas = [dict(id=f"{seed}-{number}", question="was the", answers=[answer])]
            asked.append(dict(context=" ".join(words), qas=qas))
        return json.dumps(dict(version="1.1", data=[dict(title="", paragraphs=asked)]))
    lines = [f"{' '.join(words)}\t{words.count('ann') - words.count('bob')}" for words in rows]
    if task == "classify":
        lines = [f"{' '.join(words)}\t{int('ann' in words)}" for words in rows]
    return "\n".join(["sentence\tlabel", *lines]) + "\n"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = bert_config(len(TOKENS), 32)
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return path


@pytest.mark.parametrize(
    ("task", "batch"), [*((task, "--batch=6") for task in FILES), ("tag", "--batch-tokens=90")]
)
def test_both_sides_agree(
    task: str, batch: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, dev = (tmp_path / f"{name}.{FILES[task]}" for name in ("train", "dev"))
    for seed, path in enumerate((train, dev)):
        path.write_text(text_of(task, seed))
    run, found = tmp_path / "run", tmp_path / "found.json"
    words = ["--task", task, "--model", str(encoder), "--train", str(train), "--dev", str(dev)]
    words += ["--context", "16", batch, "--steps", "12", "--lr", "2e-3", "--warmup", "2"]
    words += ["--dropout", "0", "--eval-every", "0", "--threads", "1", "--out", str(run)]
    assert finetune.main(words) == 0
    asked = ["quality", "--run", str(run), "--model", str(encoder), "--json", str(found)]
    capsys.readouterr()
    assert main([*asked, "--threads", "1"]) == 0
    printed, values = capsys.readouterr().out, json.loads(found.read_text())
    assert "the first 10 differ by at most" in printed and "2 standard errors" in printed
    own, theirs = values["losses"].values()
    assert len(own) == 12 and min(own) < own[0]
    np.testing.assert_allclose(own, theirs, rtol=0, atol=2e-5 * max(own))
    own, theirs = values["metrics"].values()
    assert own["loss"] == pytest.approx(theirs["loss"], abs=2e-5 * max(1.0, own["loss"]))
    headline = {"classify": "accuracy", "regress": "spearman", "tag": "f1", "qa": "f1"}[task]
    assert own[headline] == pytest.approx(theirs[headline], abs=1e-6)
    for row in printed.splitlines()[-2:]:
        assert "(" in row and row.startswith("| ")


def test_runs_that_it_does_not_repeat(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.tsv").write_text(text_of("classify", 0))
    words = ["--model", str(encoder), "--train", str(tmp_path / "train.tsv"), "--steps", "1"]
    words += ["--batch", "4", "--context", "16", "--threads", "1", "--out", str(tmp_path / "run")]
    assert finetune.main([*words, "--freeze", "embeddings"]) == 0
    assert main(["quality", "--run", str(tmp_path / "run"), "--model", str(encoder)]) != 0
    assert "trains all weights by AdamW" in capsys.readouterr().err
