"""Fine-tuning as a user runs it: train, go on, predict, evaluate, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import check_parts, check_refused, printed
from run_files import lines_of

from minillm import checkpoint, evaluate, finetune, train
from minillm.data.labelled import opinions
from minillm.inference import predict
from minillm.tasks.targets import TARGETS

SIZES = ["--layers", "2", "--heads", "2", "--dim", "16", "--context", "24", "--batch", "8"]
SIZES += ["--lr", "3e-3", "--threads", "1"]


def table(path: Path, rows: list[tuple[str, ...]], head: str = "text\tlabel") -> str:
    path.write_text("\n".join([head, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def some(tmp_path: Path) -> tuple[str, str]:
    """Write 80 opinions to train on and 30 others."""
    rows = [(each.texts[0], each.label) for each in opinions()[:110]]
    return table(tmp_path / "train.tsv", rows[:80]), table(tmp_path / "dev.tsv", rows[80:])


def test_from_a_file_to_predictions(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = tmp_path / "run", ["--task", "classify", "--train", some[0], "--dev", some[1]]
    words += [*SIZES, "--epochs", "1.5", "--eval-every", "5", "--save-every", "5"]
    parts = check_parts(words, (8, 10), "accuracy", some[1], tmp_path, capsys)
    measured, numbers = parts.measured, parts.numbers
    assert "labels negative, positive" in parts.said
    assert len(parts.steps) == 15  # 1.5 epochs of 80 examples
    assert sorted(measured) == [5, 8, 10, 15] and numbers["examples"] == 30

    assert predict.main([str(run), "--input", some[1], "--threads", "1", "--batch", "7"]) == 0
    rows = printed(capsys)
    actual = [line.split("\t")[1] for line in Path(some[1]).read_text().splitlines()[1:]]
    right = [row["label"] == label for row, label in zip(rows, actual, strict=True)]
    assert np.mean(right) == pytest.approx(measured[15], abs=1e-12)
    for row in rows:
        shares = row["probabilities"]
        assert max(shares, key=shares.get) == row["label"] and list(shares) == [
            "negative",
            "positive",
        ]
        assert sum(shares.values()) == pytest.approx(1, abs=2e-6)
    (tmp_path / "lines.txt").write_text(f"{rows[3]['text']}\n\n{'good ' * 99}\n")
    assert predict.main([str(run), "--input", str(tmp_path / "lines.txt"), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    again = [json.loads(line) for line in out.splitlines()]
    assert len(again) == 3 and again[0] == rows[3]
    assert "1 text of 3 had more than 24 tokens" in err


@pytest.mark.slow
def test_weights_of_an_encoder_and_of_another_task(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keep a head of the right size, and begin anew with one of another size."""
    encoder, run, pairs = (str(tmp_path / name) for name in ("encoder", "run", "pairs"))
    shape = [*SIZES, "--steps", "1", "--eval-tokens", "0"]
    data = ["--data", "austen", "--tokenizer", "wordpiece:500", "--cache", str(tmp_path)]
    assert (
        train.main([*shape, "--model", "bert", "--objective", "mlm", *data, "--out", encoder]) == 0
    )
    more = ["--batch", "8", "--steps", "1", "--threads", "1", "--dev", some[1]]
    capsys.readouterr()
    assert finetune.main(["--model", encoder, "--train", some[0], *more, "--out", run]) == 0
    assert "initial values for classifier and pairs" in capsys.readouterr().out
    assert finetune.main(["--model", run, *more, "--train", some[0], "--out", run + "2"]) == 0
    assert "initial values" not in capsys.readouterr().out
    rows = [(f"{i} is", f"{i % 4}", f"{i % 3}") for i in range(20)]
    name = table(tmp_path / "pairs.tsv", rows, "premise\thypothesis\tlabel")
    asked = ["--task", "pair", "--model", run, "--train", name, *more[:-2]]
    assert finetune.main([*asked, "--out", pairs]) == 0
    out = capsys.readouterr().out
    assert "labels 0, 1, 2" in out and "initial values for classifier, which" in out
    assert predict.main([pairs, "--input", name, "--threads", "1"]) == 0
    found = printed(capsys)
    assert [tuple(each["texts"]) for each in found] == [row[:2] for row in rows]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("text\tlabel\n", ["has no row"]),
        ("text\tlabel\na\tx\nb\tx\n", ["have the label 'x'", "two or more"]),
        ("text\tlabel\na\tx\nb\n", ["line 3 of", "1 field,", "the first line has 2"]),
        ("text\tlabel\na\tx\nb\t\n", ["line 3 of", "no label"]),
        ("review\tlabel\na\tx\n", ["line 1 of", "no column sentence or text", "'review'"]),
        (b"text\tlabel\na\tx\n\xff\ty\n", ["line 3 of", "not UTF-8"]),
        ("text\tlabel\n" + "a " * 40 + "\tx\nb\ty\n", ["line 2 of", "more than --context 24"]),
    ],
)
def test_bad_tables_are_refused(
    content: str | bytes,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_refused(SIZES, tmp_path / "bad.tsv", content, words, capsys)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--task", "sing"], ["--task", "classify"]),
        (["--model", "nowhere"], ["--model nowhere does not exist"]),
        (["--steps", "3", "--epochs", "1"], ["--epochs and --steps"]),
        (["--text-field", "x"], ["need --train"]),
        (["--train", "nowhere.tsv"], ["cannot read nowhere.tsv"]),
        (["--train", "text.pdf"], ["text.pdf is no table", ".tsv, .csv or .jsonl"]),
        (["--labels", "5"], ["--labels 5, but opinions has 2"]),
        (["--lables", "5"], ["did you mean", "--labels"]),
        (["--class-weights", "heavy"], ["--class-weights heavy is neither none, balanced nor"]),
        (["--patience", "2", "--eval-every", "0"], ["--patience 2 counts evaluations"]),
        (["--task", "regress", "--multi-label"], ["--multi-label needs --task classify or pair"]),
        (["--task", "regress", "--class-weights", "balanced"], ["--class-weights balanced weighs"]),
    ],
)
def test_bad_flags_are_refused(
    asked: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert finetune.main([*asked, *SIZES]) != 0
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_unknown_labels_and_other_models_are_refused(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    asked = ["--train", some[0], "--dev", some[1], *SIZES, "--steps", "1", "--out", run]
    assert finetune.main(asked) == 0
    assert finetune.main(["--resume", run, "--steps", "2", "--dev", some[0]]) == 0
    other = table(tmp_path / "other.tsv", [("good", "positive"), ("odd", "mixed")])
    capsys.readouterr()
    assert evaluate.main([run, "--data", other, "--threads", "1"]) != 0
    error = capsys.readouterr().err
    assert "line 3 of" in error and "'mixed'" in error and "'negative', 'positive'" in error
    gpt = ["--data", "austen", *SIZES, "--steps", "1", "--eval-tokens", "0", "--sample-tokens", "0"]
    assert train.main([*gpt, "--out", str(tmp_path / "gpt")]) == 0
    capsys.readouterr()
    assert predict.main([str(tmp_path / "gpt"), "--input", other, "--threads", "1"]) != 0
    error = capsys.readouterr().err
    assert "does not make predictions for texts; use one of --model classifier" in error
    assert finetune.main(["--model", str(tmp_path / "gpt"), *asked]) != 0
    assert "needs an encoder" in capsys.readouterr().err


KINDS = {
    "regression": (["--task", "regress"], "value"),
    "multi-label": (["--task", "classify", "--multi-label"], "labels"),
    "single-label": (["--class-weights", "balanced"], "label"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_other_targets_from_a_file_to_predictions(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, key = KINDS[kind]
    run = str(tmp_path / "run")
    rows = [(each.texts[0], each.label) for each in TARGETS[kind].built_in()[:80]]
    words = [*asked, *SIZES, "--train", table(tmp_path / "t.tsv", rows), "--tokenizer", "byte"]
    words += ["--context", "64", "--steps", "3", "--eval-tokens", "300", "--out", run]
    assert finetune.main(words) == 0
    assert finetune.main(["--resume", run, "--steps", "4"]) == 0
    capsys.readouterr()
    assert evaluate.main([run, "--threads", "1", "--tokens", "200"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    wanted = {"regression": "spearman", "multi-label": "exact_match"}.get(kind, "f1_micro")
    low, high = numbers[f"{wanted}_95"]
    assert low <= numbers[wanted] <= high
    (tmp_path / "lines.txt").write_text("good film\nnot dull\n")
    assert predict.main([run, "--input", str(tmp_path / "lines.txt"), "--threads", "1"]) == 0
    found = printed(capsys)
    assert [each["text"] for each in found] == ["good film", "not dull"]
    for each in found:
        if kind == "regression":
            assert isinstance(each[key], float) and each.keys() == {"text", "value"}
        elif kind == "multi-label":
            shares = each["probabilities"]
            assert list(shares) == ["blame", "praise"]
            assert each["labels"] == [name for name, share in shares.items() if share > 0.5]
        else:
            assert each[key] in ("positive", "negative")


def test_tables_of_labels_and_numbers(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read labels that commas separate, JSON lists, and pairs with a score."""
    words = [*SIZES, "--steps", "1", "--tokenizer", "byte", "--eval-tokens", "0"]
    several = table(tmp_path / "s.tsv", [("x", "b, a"), ("y", "a"), ("z", "[]")] * 3)
    asked = ["--multi-label", "--train", several, *words, "--out", str(tmp_path / "several")]
    assert finetune.main(asked) == 0
    assert "labels a, b" in capsys.readouterr().out
    rows = [{"text": "x", "label": ["b", "a,c"]}, {"text": "y", "label": ["b"]}] * 4
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["--multi-label", "--train", str(tmp_path / "l.jsonl"), *words]
    assert finetune.main([*asked, "--out", str(tmp_path / "lists")]) == 0
    assert "labels a,c, b" in capsys.readouterr().out
    head = "sentence1\tsentence2\tscore"
    pairs = table(tmp_path / "p.tsv", [("a b", "a c", "1.5"), ("d", "d", "5")] * 4, head)
    asked = ["--task", "regress", "--pairs", "--train", pairs, *words]
    assert finetune.main([*asked, "--out", str(tmp_path / "pairs")]) == 0
    capsys.readouterr()
    assert predict.main([str(tmp_path / "pairs"), "--input", pairs, "--threads", "1"]) == 0
    found = printed(capsys)
    assert found[1]["texts"] == ["d", "d"] and isinstance(found[1]["value"], float)


@pytest.mark.parametrize(
    ("asked", "content", "words"),
    [
        (["--task", "regress"], "text\tlabel\na\t1\nb\tx\n", ["line 3 of", "'x'", "a number"]),
        (["--task", "regress"], "text\tlabel\na\t1\nb\t1\n", ["have the number 1"]),
        (["--multi-label"], "text\tlabel\na\tx\nb\tx,,y\n", ["line 3 of", "an empty label"]),
        (["--multi-label"], "text\tlabel\na\tx\nb\t\n", ["line 3 of", "no label"]),
        (["--multi-label"], "text\tlabel\na\tx,y\nb\ty,x\n", ["the same labels, x, y"]),
        ([], "text\tlabel\na\tx\nb\ty\n", ["--class-weights 1,2,3", "the labels x, y"]),
    ],
)
def test_bad_targets_are_refused(
    asked: list[str],
    content: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = tmp_path / "bad.tsv", tmp_path / "run"
    path.write_text(content)
    weights = [] if asked else ["--class-weights", "1,2,3"]
    given = [*asked, *SIZES, "--tokenizer", "byte", "--train", str(path), *weights]
    assert finetune.main([*given, "--out", str(run)]) != 0
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert all(word in error for word in words), error
    assert not run.exists()


@pytest.mark.slow
def test_patience_ends_a_run_and_goes_on_counting(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train with a rate that changes nothing: step 2 is the best, two more evaluations the end."""
    run = str(tmp_path / "run")
    words = ["--train", some[0], "--dev", some[1], *SIZES, "--tokenizer", "byte", "--steps", "20"]
    words += ["--context", "64", "--lr", "1e-30", "--weight-decay", "0", "--eval-every", "2"]
    words += ["--patience", "2", "--keep", "1", "--out", run]
    assert finetune.main([*words, "--stop-after", "4"]) == 0
    assert len(lines_of(tmp_path / "run")) == 4
    capsys.readouterr()
    assert finetune.main(["--resume", run, "--stop-after", "20"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ended at step 6" in said and "2 evaluations since step 2" in said
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert finetune.main(["--resume", run]) == 0
    assert "is the end of its run: the held-out metric was no better" in capsys.readouterr().out
    assert len(lines_of(tmp_path / "run")) == 6
    assert finetune.main(["--resume", run, "--patience", "3"]) == 0
    assert len(lines_of(tmp_path / "run")) == 8
    hasty = tmp_path / "hasty"
    assert finetune.main([*words, "--patience", "1", "--out", str(hasty)]) == 0
    assert len(lines_of(hasty)) == 4
    best = checkpoint.find(hasty, True)
    assert best.name.endswith("02")  # saved at its evaluation, although none was due
    capsys.readouterr()
    rows = table(tmp_path / "few.tsv", [("a", "x"), ("b", "y")])
    asked = ["--train", rows, *SIZES, "--tokenizer", "byte", "--patience", "2", "--out"]
    assert finetune.main([*asked, str(tmp_path / "none")]) != 0
    assert "--patience 2 needs held-out data" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a classifier for a step; return its run, beside which train.tsv lies."""
    path = tmp_path_factory.mktemp("trained")
    rows = [(each.texts[0], each.label) for each in opinions()[:30]]
    words = ["--train", table(path / "train.tsv", rows), *SIZES, "--tokenizer", "byte"]
    words += ["--context", "64", "--steps", "1", "--out", str(path / "run")]
    assert finetune.main(words) == 0
    return path / "run"


BAD_FILES: list[tuple[str, str | bytes, list[str]]] = [
    ("bad.tsv", "", ["is empty"]),
    ("bad.tsv", "text\tlabel\n", ["has no row"]),
    ("bad.tsv", "text\tlabel\na\tpositive\nb\n", ["line 3 of", "1 field"]),
    ("bad.csv", 'text,label\na,positive\n"b,negative\n', ["line 3 of", "no CSV"]),
    ("bad.jsonl", '{"text": "a", "label": "positive"}\n{"text": 3, "label": "x"}\n', ["line 2 of"]),
    ("bad.tsv", b"text\tlabel\na\tpositive\n\xff\tnegative\n", ["line 3 of", "not UTF-8"]),
]


@pytest.mark.parametrize("program", ["--dev", "evaluate", "predict"])
@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES)
def test_bad_files_are_refused_by_every_program(
    program: str,
    name: str,
    content: str | bytes,
    words: list[str],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = tmp_path / name, tmp_path / "run"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    train_on = str(trained.parent / "train.tsv")
    capsys.readouterr()
    status = {
        "--dev": lambda: finetune.main(
            [*SIZES, "--train", train_on, "--dev", str(path), "--out", str(run)]
        ),
        "evaluate": lambda: evaluate.main([str(trained), "--data", str(path), "--threads", "1"]),
        "predict": lambda: predict.main([str(trained), "--input", str(path), "--threads", "1"]),
    }[program]()
    out, error = capsys.readouterr()
    assert status != 0 and error.count("error: ") == 1 and "Traceback" not in error
    assert all(word in error for word in [name, *words]), error
    assert not run.exists() and "{" not in out


def test_a_run_of_another_task_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, words in (
        ("tag", "a run of --model classifier, not of --task tag"),
        ("regress", "cannot change --problem regression (was single-label)"),
    ):
        capsys.readouterr()
        assert finetune.main(["--task", task, "--resume", str(trained)]) != 0
        assert words in capsys.readouterr().err
    assert finetune.main(["--task", "classify", "--resume", str(trained), "--steps", "2"]) == 0
    numbers = table(tmp_path / "numbers.tsv", [("a", "1.5"), ("b", "2.5")])
    capsys.readouterr()
    assert evaluate.main([str(trained), "--data", numbers, "--threads", "1"]) != 0
    assert "line 2 of" in (error := capsys.readouterr().err) and "'1.5', which is not" in error
    (tmp_path / "empty.txt").write_text("")
    assert predict.main([str(trained), "--input", str(tmp_path / "empty.txt")]) != 0
    assert "empty.txt is empty" in capsys.readouterr().err
