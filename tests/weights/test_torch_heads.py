"""Heads of encoders go to transformers and come from it with the same predictions and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "PyTorch or transformers is not installed; .ci/run installs them for these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from minillm import finetune  # noqa: E402
from minillm.inference import predict  # noqa: E402
from minillm.weights import exporting, importing  # noqa: E402

WORDS = ["a", "bad", "dull", "film", "good", "great", "is", "it", "not", "story", "the", "very"]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXTS = ["a good film", "the story is not very warm and it is sad", "dull", "great story with warm"]
KINDS = {
    "single_label_classification": ["--task", "classify"],
    "multi_label_classification": ["--multi-label"],
    "regression": ["--task", "regress"],
}


def folder(
    path: Path, name: str = "Bert", ending: str = "SequenceClassification", **more: Any
) -> Any:
    """Write a random encoder of transformers with a head and return it."""
    torch.manual_seed(3)
    own = SIZES if name != "DistilBert" else {}
    sizes = {**own, "vocab_size": len(MARKS + WORDS), "max_position_embeddings": 40, **more}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}For{ending}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(MARKS + WORDS) + "\n")
    return model


def predictions(path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """Return what `minillm predict` prints for texts."""
    lines = path.parent / "lines.txt"
    lines.write_text("\n".join(texts) + "\n")
    capsys.readouterr()
    assert predict.main([str(path), "--input", str(lines), "--threads", "1"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def outputs(model: Any, tokenizer: Any, problem: str, texts: list[str]) -> np.ndarray:
    """Return probabilities or numbers by transformers, each text by itself: [N, labels]."""
    found = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        by = dict(
            single_label_classification=lambda z: z.softmax(-1),
            multi_label_classification=torch.sigmoid,
            regression=lambda z: z,
        )
        found.append(by[problem](logits).numpy())
    return np.array(found)


def numbers(rows: list[Any]) -> np.ndarray:
    return np.array(
        [[row["value"]] if "value" in row else [*row["probabilities"].values()] for row in rows]
    )


@pytest.mark.parametrize("problem", list(KINDS))
def test_a_head_of_transformers_predicts_the_same(
    problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its folder, and through `minillm import` and `minillm export`."""
    names = {0: "bad", 1: "fine", 2: "good"} if problem != "regression" else {0: "LABEL_0"}
    source, more = tmp_path / "source", {"problem_type": problem}
    if problem == "regression":
        more["problem_type"] = None  # follows from a single label
    model = folder(source, id2label=names, label2id={v: k for k, v in names.items()}, **more)
    tokenizer = transformers.BertTokenizer(str(source / "vocab.txt"))
    wanted = outputs(model, tokenizer, problem, TEXTS)
    rows = predictions(source, TEXTS, capsys)
    np.testing.assert_allclose(numbers(rows), wanted, rtol=0, atol=2e-6)
    if problem == "single_label_classification":
        assert [row["label"] for row in rows] == [names[int(p.argmax())] for p in wanted]
        assert list(rows[0]["probabilities"]) == list(names.values())
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    assert "minillm predict" in capsys.readouterr().out
    assert predictions(tmp_path / "run", TEXTS, capsys) == rows
    out = tmp_path / "out"
    assert exporting.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert type(again).__name__ == "BertForSequenceClassification"
    assert again.config.id2label == names and again.config.problem_type == problem
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("problem", list(KINDS))
def test_a_trained_head_predicts_the_same_in_transformers(
    problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, table = tmp_path / "encoder", tmp_path / "train.tsv"
    folder(encoder, "Bert", "PreTraining")
    labels = {"regression": ["1.5", "-2"], "multi_label_classification": ["up,on", "on"]}
    pairs = zip(TEXTS, labels.get(problem, ["up", "down"]) * 2, strict=True)
    table.write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in pairs))
    words = [*KINDS[problem], "--model", str(encoder), "--train", str(table), "--batch", "4"]
    words += ["--steps", "3", "--lr", "1e-2", "--context", "24", "--threads", "1"]
    assert finetune.main([*words, "--out", str(tmp_path / "run")]) == 0
    rows = predictions(tmp_path / "run", TEXTS, capsys)
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.problem_type == problem
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    wanted = outputs(model, tokenizer, problem, TEXTS)
    np.testing.assert_allclose(numbers(rows), wanted, rtol=0, atol=2e-6)
    if problem != "regression":
        assert list(rows[0]["probabilities"]) == list(model.config.label2id)


@pytest.mark.parametrize("name", ["Roberta", "DistilBert"])
def test_other_encoders_classify_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their head is a pooler of another name, in DistilBERT with ReLU."""
    source, more = tmp_path / "source", dict[str, Any](num_labels=3)
    if name == "Roberta":
        more |= dict(pad_token_id=1, bos_token_id=2, eos_token_id=3, type_vocab_size=1)
    else:
        more |= dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    model = folder(source, name, **more)
    # No [UNK], whose id RoBERTa takes for padding here.
    texts = ["a good film", "it is not a very good story", "dull"]
    given = transformers.BertTokenizer(str(source / "vocab.txt"))
    wanted = outputs(
        lambda **each: model(input_ids=each["input_ids"]),
        given,
        "single_label_classification",
        texts,
    )
    found = numbers(predictions(source, texts, capsys))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    assert np.ptp(found) > 0.05


def test_a_pair_classifier_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Score pairs by a cross-encoder with one label, which has no training options.

    Its export marks the second text by the tokenizer's own settings.
    """
    model = folder(tmp_path / "source", id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0})
    pairs = list(zip(TEXTS[:2], TEXTS[2:], strict=True))
    rows = [f"{one}\t{two}" for one, two in pairs]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2", *rows]) + "\n")
    words = [str(tmp_path / "source"), "--pairs", "--input", str(tmp_path / "pairs.tsv")]
    capsys.readouterr()
    assert predict.main([*words, "--threads", "1"]) == 0
    found = [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()]
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert importing.main([str(tmp_path / "source"), "--out", run]) == 0
    assert exporting.main([run, "--out", out]) == 0
    tokenizer = transformers.BertTokenizer(str(tmp_path / "source" / "vocab.txt"))
    exported = transformers.AutoTokenizer.from_pretrained(out)
    for value, (one, two) in zip(found, pairs, strict=True):
        for each in (tokenizer, exported):
            with torch.no_grad():
                wanted = model(**each(one, two, return_tensors="pt")).logits.item()
            assert abs(value - wanted) <= 1e-5


def test_a_head_whose_labels_fit_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {0: "up", 1: "down", 2: "still"}
    folder(tmp_path / "source", id2label=names, label2id={v: k for k, v in names.items()})
    table = tmp_path / "train.tsv"
    table.write_text("text\tlabel\na film\tdown\nthe story\tup\n")
    words = ["--model", str(tmp_path / "source"), "--train", str(table), "--batch", "2"]
    words += ["--steps", "1", "--context", "24", "--threads", "1"]
    assert finetune.main([*words, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "labels up, down, still" in said and "initial values" not in said


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("Roberta", "SequenceClassification"),
        ("DistilBert", "SequenceClassification"),
        ("Bert", "TokenClassification"),
        ("Roberta", "TokenClassification"),
        ("DistilBert", "TokenClassification"),
        ("Bert", "QuestionAnswering"),
        ("Roberta", "QuestionAnswering"),
        ("DistilBert", "QuestionAnswering"),
    ],
)
def test_other_heads_come_back_bit_for_bit(name: str, ending: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_labels": 2 if ending == "QuestionAnswering" else 5}
    if name == "Roberta":
        more |= dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1)
    if name == "DistilBert":
        more |= dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    model = folder(tmp_path / "source", name, ending, **more)
    (tmp_path / "source" / "vocab.txt").unlink()
    assert importing.main([str(tmp_path / "source"), "--out", str(tmp_path / "run")]) == 0
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    auto = getattr(transformers, f"AutoModelFor{ending}")
    again = auto.from_pretrained(tmp_path / "out")
    assert type(again) is type(model) and again.config.num_labels == model.config.num_labels
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
