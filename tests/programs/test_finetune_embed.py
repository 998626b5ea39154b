"""Sentence embeddings as a user trains them: from a file to vectors and metrics, and bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import (
    check_kill,
    check_parts,
    check_ranks,
    check_refused,
    printed,
)
from mpi_helpers import needs_mpirun
from run_files import lines_of

from minillm import evaluate, finetune
from minillm.data.related_texts import Related, translated
from minillm.inference import embed, predict

SIZES = ["--layers", "2", "--heads", "2", "--dim", "16", "--context", "24", "--batch", "8"]
SIZES += ["--lr", "5e-3", "--tokenizer", "wordpiece:300", "--threads", "1"]
EMBED = ["--task", "embed", *SIZES]


def triplets() -> list[Related]:
    """Return 150 sentences and their translations, each with that of the next one as negative."""
    found = translated()[:151]
    return [
        each._replace(texts=(*each.texts, other.texts[1]))
        for each, other in itertools.pairwise(found)
    ]


def table(path: Path, examples: list[Related], scores: bool = False) -> str:
    """Write triplets, or pairs of which those that belong together have the score 1, others 0."""
    if scores:
        rows = [(*each.texts[:2], "1") for each in examples]
        rows += [(each.texts[0], each.texts[2], "0") for each in examples]
    else:
        rows = [each.texts for each in examples]
    head = ("sentence1", "sentence2", "score") if scores else ("anchor", "positive", "negative")
    path.write_text("".join("\t".join(row) + "\n" for row in [head, *rows]), encoding="utf-8")
    return str(path)


@pytest.fixture
def some(tmp_path: Path) -> tuple[str, str]:
    """Write 120 examples to train on and 30 others."""
    found = triplets()
    return table(tmp_path / "train.tsv", found[:120]), table(tmp_path / "dev.tsv", found[120:])


@pytest.mark.slow
def test_from_a_file_to_vectors(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train in three parts and in one, and rank the candidates by the printed vectors."""
    run, words = tmp_path / "run", [*EMBED, "--train", some[0], "--dev", some[1]]
    words += ["--epochs", "4", "--eval-every", "20", "--save-every", "20"]
    parts = check_parts(words, (20, 33), "mrr", some[1], tmp_path, capsys, microbatch=(4, 8))
    assert "120 pairs with a hard negative" in parts.said
    assert len(parts.steps) == 60  # 4 epochs of 120 examples
    assert sorted(parts.measured) == [20, 33, 40, 60] and parts.measured[60] > 0.2
    numbers = parts.numbers
    low, high = numbers["mrr_95"]
    assert low < numbers["mrr"] < high
    assert numbers["examples"] == 30 and numbers["candidates"] == 31

    vectors, candidates = {}, {}
    for role in ("anchor", "positive", "negative"):
        read = [str(run), "--input", some[1], "--threads", "1", "--text-field", role]
        assert predict.main([*read, "--batch", "7"]) == 0
        rows = printed(capsys)
        vectors[role] = np.array([row["embedding"] for row in rows])
        if role != "anchor":
            candidates |= {row["text"]: np.array(row["embedding"]) for row in rows}
    every, ranks = np.array(list(candidates.values())), []
    for anchor, positive in zip(vectors["anchor"], vectors["positive"], strict=True):
        ranks.append(int((every @ anchor >= positive @ anchor - 1e-9).sum()))
    assert numbers["accuracy_at_1"] == pytest.approx(np.mean([r == 1 for r in ranks]))
    assert numbers["mrr"] == pytest.approx(np.mean([1 / r for r in ranks]))
    assert predict.main([str(run), "--input", some[1], "--threads", "1", "--pairs"]) == 0
    cosines = [row["cosine"] for row in printed(capsys)]
    both = (vectors["anchor"] * vectors["positive"]).sum(1)
    np.testing.assert_allclose(cosines, both, rtol=0, atol=2e-6)

    anchors = [each.texts[0] for each in triplets()[120:]]
    (tmp_path / "lines.txt").write_text("\n".join(anchors) + "\n")
    asked = ["--input", str(tmp_path / "lines.txt"), "--threads", "1"]
    assert embed.main([str(run), *asked]) == 0
    rows = printed(capsys)
    assert [row["text"] for row in rows] == anchors
    found_ = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(found_, vectors["anchor"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_scores_are_measured_by_correlation(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train on the pairs with score 1, and measure those held out, of both scores."""
    run, scored = tmp_path / "run", table(tmp_path / "scored.tsv", triplets(), scores=True)
    asked = [*EMBED, "--train", scored, "--min-score", "1", "--steps", "30", "--eval-every", "15"]
    assert finetune.main([*asked, "--out", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "30 held out with scores" in shown and "Spearman" in shown
    values = [line["val_spearman"] for line in lines_of(run) if "val_spearman" in line]
    assert evaluate.main([str(run), "--threads", "1"]) == 0
    (numbers,) = printed(capsys)
    assert len(values) == 2 and numbers["spearman"] == values[-1]
    low, high = numbers["spearman_95"]
    assert low < numbers["spearman"] < high and numbers["examples"] == 30


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("anchor\tpositive\na\tb\na\tb\n", ["one positive alone"]),
        ("anchor\tpositive\na\tb\nc\n", ["line 3 of", "1 field,"]),
        ("anchor\tpositive\na\tb\nc\t\n", ["line 3 of", "no text as positive"]),
        ("anchor\tpositive\tscore\na\tb\t1\nc\td\t2\n", ["has scores", "--min-score"]),
        (b"anchor\tpositive\na\tb\n\xff\td\n", ["line 3 of", "not UTF-8"]),
        ("anchor\tpositive\na\tb\nc\t" + "d" * 60 + "\n", ["line 3 of", "more than --context 24"]),
    ],
)
def test_bad_files_are_refused(
    content: str | bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(EMBED, tmp_path / "bad.tsv", content, words, capsys)


def test_flags_without_meaning_are_refused(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("anchor\tpositive\na\tb\nc\td\ne\tf\n")
    for words, said in (
        (["--min-score", "1"], "need --train"),
        (["--train", some[0], "--min-score", "1"], "--min-score 1 needs scores"),
        (["--train", str(pairs), "--batch", "1"], "--batch 1 makes steps of 1 example"),
    ):
        assert finetune.main([*EMBED, *words, "--out", str(tmp_path / "run")]) != 0
        error = capsys.readouterr().err
        assert said in error and error.count("error: ") == 1 and "Traceback" not in error
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_of_another_task_and_of_an_embedder(
    some: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begin with the encoder of a classifier, and go on with the pooling of an embedder."""
    texts, run = str(tmp_path / "texts"), str(tmp_path / "run")
    assert finetune.main([*SIZES, "--steps", "1", "--eval-tokens", "0", "--out", texts]) == 0
    asked = ["--task", "embed", "--train", some[0], "--steps", "1", "--threads", "1"]
    capsys.readouterr()
    assert finetune.main([*asked, "--model", texts, "--pooling", "cls", "--out", run]) == 0
    assert "cls pooling" in capsys.readouterr().out
    assert finetune.main([*asked, "--model", run, "--out", run + "2"]) == 0
    shown = capsys.readouterr().out
    assert "cls pooling" in shown and "initial values" not in shown
    more = ["--steps", "1", "--batch", "8", "--threads", "1", "--eval-tokens", "0"]
    assert finetune.main([*more, "--model", run, "--out", texts + "2"]) == 0
    assert "initial values for classifier and pairs" in capsys.readouterr().out
    assert evaluate.main([run, "--data", some[1], "--threads", "1"]) == 0
    assert "accuracy_at_1" in json.loads(capsys.readouterr().out)


@pytest.mark.slow
@needs_mpirun
def test_ranks_of_mpirun_train_embed_and_measure_like_one_process(
    some: tuple[str, str], tmp_path: Path
) -> None:
    """Train on two replicas, go on with tp, and read the run on one process and on two."""
    asked = [*EMBED, "--train", some[0], "--dev", some[1], "--dtype", "float64"]
    asked += ["--eval-every", "6", "--steps", "12"]
    check_ranks(asked, ["--tp", "2", "--dp", "1"], some[1], 30, tmp_path)


@pytest.mark.slow
@needs_mpirun
def test_a_killed_rank_ends_both_and_the_run_goes_on(some: tuple[str, str], tmp_path: Path) -> None:
    """Kill a rank in step 4, resume after step 2 amid an epoch, and compare all steps."""
    words = ["--preset", "embedder", *SIZES, "--train", some[0], "--dev", some[1]]
    words += ["--epochs", "0.5", "--microbatch", "2"]
    assert check_kill("embed", words, tmp_path) == 8
