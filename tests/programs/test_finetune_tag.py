"""Taggers as a user trains them: from a file to tags and metrics, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_runs import check_kill, check_parts, check_ranks, check_refused, printed
from mpi_helpers import needs_mpirun

from minillm import evaluate, finetune
from minillm.data.conll import Sentence
from minillm.data.journeys import journeys
from minillm.data.tags import spans_of
from minillm.inference import predict

SIZES = ["--layers", "2", "--heads", "2", "--dim", "16", "--context", "48", "--batch", "8"]
SIZES += ["--lr", "1e-2", "--threads", "1"]
TAG = ["--task", "tag", *SIZES]


def columns(path: Path, sentences: list[Sentence], separator: str = "\t") -> str:
    """Write sentences as columns, `separator` in the lines between them."""
    texts = (
        "".join(f"{word}\t{tag}\n" for word, tag in zip(each.tokens, each.tags, strict=True))
        for each in sentences
    )
    path.write_text(f"{separator}\n".join(texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def some(tmp_path: Path) -> tuple[str, str]:
    """Write 120 journeys to train on and 30 others."""
    found = journeys()[:150]
    return columns(tmp_path / "train.conll", found[:120]), columns(
        tmp_path / "dev.conll", found[120:]
    )


@pytest.mark.slow
def test_from_a_file_to_entities(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train in three parts and in one, and count the entities that the printed tags have."""
    run, words = tmp_path / "run", [*TAG, "--train", some[0], "--dev", some[1]]
    words += ["--epochs", "4", "--eval-every", "20", "--save-every", "20"]
    parts = check_parts(words, (20, 33), "f1", some[1], tmp_path, capsys)
    assert "IOB2, types company, person, place" in parts.said
    assert len(parts.steps) == 60  # 4 epochs of 120 sentences
    assert sorted(parts.measured) == [20, 33, 40, 60] and parts.measured[60] > 0.1
    numbers = parts.numbers
    low, high = numbers["f1_95"]
    assert low < numbers["f1"] < high
    assert numbers["sentences"] == 30 and list(numbers["types"]) == ["company", "person", "place"]

    assert predict.main([str(run), "--input", some[1], "--threads", "1", "--batch", "7"]) == 0
    rows, sentences = printed(capsys), journeys()[120:150]
    right = predicted = actual = 0
    for row, each in zip(rows, sentences, strict=True):
        assert tuple(row["tokens"]) == each.tokens
        spans = [(span["type"], span["start"], span["end"]) for span in row["spans"]]
        right += len(set(spans) & set(spans_of(each.tags)))
        predicted, actual = predicted + len(spans), actual + len(spans_of(each.tags))
    assert numbers["entities"] == actual
    assert numbers["f1"] == pytest.approx(2 * right / (predicted + actual), abs=1e-12)


def test_texts_of_lines_have_places_and_long_ones_are_cut(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = str(tmp_path / "run"), "Ann Galley met Belby, in  Torby."
    asked = [*TAG, "--train", some[0], "--dev", some[1], "--steps", "40", "--out", run]
    assert finetune.main(asked) == 0
    (tmp_path / "new.txt").write_text(f"{text}\n\n{'to Torby ' * 99}\n")
    capsys.readouterr()
    assert predict.main([run, "--input", str(tmp_path / "new.txt"), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    first, empty, long = map(json.loads, out.splitlines())
    assert first["text"] == text and len(first["tags"]) == len(first["tokens"]) == 8
    assert first["spans"] and empty == {"text": "", "tokens": [], "tags": [], "spans": []}
    for span in first["spans"]:
        assert text[span["start"] : span["end"]] == span["text"]
    assert len(long["tags"]) == 198 and set(long["tags"][46:]) == {"O"}
    assert "1 sentence of 3 had more than 48 tokens" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["has no sentence"]),
        ("a\tO\n\nb\tO\n", ["all words of", "the tag O"]),
        ("a\tB-x\nb\n", ["line 2 of", "1 column,"]),
        ("a\tNOUN\n", ["line 1 of", "the tag 'NOUN'"]),
        (b"a\tB-x\n\n\xff\tO\n", ["line 3 of", "not UTF-8"]),
        ("a\tB-x\n\n" + "b\tO\n" * 60, ["line 3 of", "more than --context 48"]),
    ],
)
def test_bad_files_are_refused(
    content: str | bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(TAG, tmp_path / "bad.conll", content, words, capsys)


def test_unknown_types_and_columns_are_named(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert finetune.main([*TAG, "--tag-field", "2"]) != 0
    assert "need --train" in capsys.readouterr().err
    asked = ["--train", some[0], "--dev", some[1], "--steps", "1"]
    assert finetune.main([*TAG, *asked, "--out", run]) == 0
    ship = Sentence(("the", "Torby"), ("O", "B-ship"), 1)
    other = columns(tmp_path / "other.conll", [*journeys()[:1], ship])
    for words in ([run, "--data", other, "--threads", "1"],):
        capsys.readouterr()
        assert evaluate.main(words) != 0
        error = capsys.readouterr().err
        line = len(journeys()[0].tokens) + 2
        assert f"the sentence at line {line} of" in error and "'ship'" in error
        assert "'company', 'person', 'place'" in error


@pytest.mark.slow
def test_weights_of_another_task_and_of_a_tagger(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begin with a new head behind a classifier, and keep one whose types are those of the data."""
    texts, run = str(tmp_path / "texts"), str(tmp_path / "run")
    assert finetune.main([*SIZES, "--steps", "1", "--eval-tokens", "0", "--out", texts]) == 0
    asked = ["--task", "tag", "--train", some[0], "--steps", "1", "--threads", "1", "--batch", "8"]
    capsys.readouterr()
    assert finetune.main([*asked, "--model", texts, "--out", run]) == 0
    assert "initial values for tags, which" in capsys.readouterr().out
    assert finetune.main([*asked, "--model", run, "--out", run + "2"]) == 0
    assert "initial values" not in capsys.readouterr().out
    assert finetune.main([*SIZES, "--steps", "1", "--model", run, "--out", texts + "2"]) == 0
    assert "initial values for classifier and pairs" in capsys.readouterr().out


@pytest.mark.slow
@needs_mpirun
def test_ranks_of_mpirun_train_tag_and_measure_like_one_process(
    some: tuple[str, str], tmp_path: Path
) -> None:
    """Train on two replicas, go on with tp, and read the run on one process and on two."""
    asked = [*TAG, "--train", some[0], "--dev", some[1], "--dtype", "float64", "--eval-every", "6"]
    check_ranks([*asked, "--steps", "12"], ["--tp", "2", "--dp", "1"], some[1], 30, tmp_path)


@pytest.mark.slow
@needs_mpirun
def test_a_killed_rank_ends_both_and_the_run_goes_on(some: tuple[str, str], tmp_path: Path) -> None:
    """Kill a rank in step 4, resume after step 2 amid an epoch, and compare all steps."""
    words = ["--preset", "tagger", *SIZES, "--train", some[0], "--dev", some[1], "--epochs", "0.5"]
    assert check_kill("tag", words, tmp_path) == 8
