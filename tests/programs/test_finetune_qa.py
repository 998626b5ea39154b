"""Readers as a user trains them: from a file to answers and metrics, and bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import check_kill, check_parts, check_ranks, check_refused, printed
from mpi_helpers import needs_mpirun

from minillm import finetune
from minillm.data.facts import facts
from minillm.data.squad import Question
from minillm.inference import predict

SIZES = ["--layers", "2", "--heads", "2", "--dim", "16", "--context", "32", "--batch", "8"]
SIZES += ["--lr", "1e-2", "--threads", "1"]
QA = ["--task", "qa", *SIZES]


def written(path: Path, questions: Sequence[Question]) -> str:
    """Write questions in the format of SQuAD 2.0, each in a paragraph of its own."""
    paragraphs = []
    for each in questions:
        answers = [{"text": text, "answer_start": start} for text, start in each.answers]
        entry = {"id": each.id, "question": each.question, "answers": answers}
        entry["is_impossible"] = not answers
        paragraphs.append({"context": each.context, "qas": [entry]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
    return str(path)


@pytest.fixture
def some(tmp_path: Path) -> tuple[str, str]:
    """Write 64 questions to train on and 32 others, of which each fourth has no answer."""
    found = [
        each._replace(answers=each.answers if i % 4 else ()) for i, each in enumerate(facts()[:96])
    ]
    return written(tmp_path / "train.json", found[:64]), written(tmp_path / "dev.json", found[64:])


def official(rows: list[dict[str, Any]], questions: Sequence[Question]) -> list[float]:
    """Return exact matches, where answers have no articles, marks or capitals that count."""

    def plain(text: str) -> str:
        return " ".join(word for word in text.lower().split() if word not in ("a", "the"))

    wanted = [plain(each.answers[0].text) if each.answers else "" for each in questions]
    return [float(plain(row["answer"]) == gold) for row, gold in zip(rows, wanted, strict=True)]


@pytest.mark.slow
def test_from_a_file_to_answers(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train in three parts and in one, and count the right ones of the printed answers."""
    run, words = tmp_path / "run", [*QA, "--train", some[0], "--dev", some[1]]
    words += ["--epochs", "3", "--eval-every", "10", "--save-every", "10", "--doc-stride", "6"]
    parts = check_parts(words, (10, 17), "f1", some[1], tmp_path, capsys)
    said, numbers = parts.said, parts.numbers
    assert "64 questions to train on in" in said and "16 of them without an answer" in said
    assert 20 in parts.measured and len(parts.steps) >= 24
    assert numbers["questions"] == 32
    assert numbers["answerable"]["questions"] == 24 and numbers["unanswerable"]["questions"] == 8
    assert predict.main([str(run), "--input", some[1], "--threads", "1", "--batch", "7"]) == 0
    rows, questions = printed(capsys), [*facts()[64:96]]
    questions = [
        each._replace(answers=each.answers if i % 4 else ()) for i, each in enumerate(questions)
    ]
    exact = official(rows, questions)
    assert numbers["exact_match"] == pytest.approx(sum(exact) / 32, abs=1e-12)
    for row, each in zip(rows, questions, strict=True):
        assert row["id"] == each.id and row["question"] == each.question
        for span in (row, *row["n_best"]):
            if span["answer"]:
                assert each.context[span["start"] : span["end"]] == span["answer"]
        scores = [span["score"] for span in row["n_best"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert bool(row["answer"]) == (row["null_score"] - scores[0] <= 0)


def test_answers_in_any_case_and_never(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Move the threshold; limit the answer to a word, and print five spans."""
    run = str(tmp_path / "run")
    asked = [*QA, "--train", some[0], "--steps", "2", "--out", run]
    assert finetune.main(asked) == 0
    capsys.readouterr()
    shown = ["--input", some[1], "--threads", "1", "--n-best", "5", "--max-answer", "1"]
    for threshold, answered in (("1e9", True), ("-1e9", False)):
        assert predict.main([run, *shown, "--null-threshold", threshold]) == 0
        rows = printed(capsys)
        assert all(bool(row["answer"]) == answered for row in rows)
        assert all((row["start"] is not None) == answered for row in rows)
        assert all(len(row["n_best"]) == 5 for row in rows)
        assert all(" " not in span["answer"] for row in rows for span in row["n_best"])
    lines = [{"question": "Where ?", "context": "In the mill ."}, {"question": "x", "context": " "}]
    path = tmp_path / "new.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert predict.main([run, "--input", str(path), "--threads", "1"]) == 0
    found, empty = printed(capsys)
    assert found["id"] == "1" and len(found["n_best"]) == 3
    assert empty["answer"] == "" and empty["n_best"] == [] and empty["start"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"answers": [{"text": "Rome", "answer_start": 3}]},
            ["question '0' in line 1 of", "'Rome' at 3"],
        ),
        ({"answers": [{"text": "x", "answer_start": 999}]}, ["'0'", "outside its context"]),
        ({"answers": []}, ["'0'", "0 answers and is_impossible false"]),
        ({"question": "why " * 30}, ["'0'", "more than half of --context 32"]),
        ({"id": "1"}, ["two questions of the id '1'"]),
    ],
)
def test_bad_questions_are_refused(
    change: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    questions = [each._replace(id=str(i)) for i, each in enumerate(facts()[:20])]
    value = json.loads(Path(written(path, questions)).read_text())
    value["data"][0]["paragraphs"][0]["qas"][0] |= change
    check_refused(QA, path, json.dumps(value), words, capsys)


def test_nothing_of_one_context_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [facts()[0]._replace(id=str(i)) for i in range(20)]
    name = written(tmp_path / "one.json", one)
    asked = [*QA, "--train", name, "--steps", "1", "--out", str(tmp_path / "run")]
    assert finetune.main(asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "20 questions to train on in 20 windows; 0 held out" in said


def test_other_models_are_refused(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "classes")
    assert finetune.main(["--task", "classify", *SIZES, "--steps", "1", "--out", run]) == 0
    capsys.readouterr()
    assert predict.main([run, "--input", some[0], "--n-best", "2", "--threads", "1"]) != 0
    error = capsys.readouterr().err
    assert "--n-best" in error and error.count("error: ") == 1


@pytest.mark.slow
@needs_mpirun
def test_ranks_of_mpirun_train_answer_and_measure_like_one_process(
    some: tuple[str, str], tmp_path: Path
) -> None:
    """Train on two replicas, go on with tp, and read the run on one process and on two."""
    asked = [*QA, "--train", some[0], "--dev", some[1], "--dtype", "float64", "--doc-stride", "6"]
    asked += ["--eval-every", "6", "--steps", "12"]
    going_on = ["--tp", "2", "--dp", "1", "--sequence-parallel"]
    check_ranks(asked, going_on, some[1], 32, tmp_path)


@pytest.mark.slow
@needs_mpirun
def test_a_killed_rank_ends_both_and_the_run_goes_on(some: tuple[str, str], tmp_path: Path) -> None:
    """Kill a rank in step 4, resume after step 2 amid an epoch, and compare all steps."""
    words = ["--preset", "reader", *SIZES, "--train", some[0], "--dev", some[1], "--epochs", "1"]
    assert check_kill("qa", words, tmp_path) >= 8
