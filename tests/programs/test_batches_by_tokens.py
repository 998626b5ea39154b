"""Batches by tokens as a user asks for them: exact epochs, going on amid one, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_runs import check_ranks, lines_of
from mpi_helpers import needs_mpirun

from minillm import finetune, train
from minillm.data.journeys import journeys
from minillm.data.labelled import opinions

SIZES = ["--layers", "1", "--heads", "2", "--dim", "16", "--context", "24", "--lr", "3e-3"]
SIZES += ["--threads", "1"]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Write 80 opinions."""
    rows = [f"{each.texts[0]}\t{each.label}\n" for each in opinions()[:80]]
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(rows))
    return str(path)


@pytest.mark.slow
def test_an_epoch_has_each_text_once_and_goes_on_amid_it(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "classify", "--train", texts, "--dev", texts, *SIZES, "--eval-every", "0"]
    words += ["--tokenizer", "char", "--batch-tokens", "150", "--microbatch-tokens", "60"]
    words += ["--epochs", "2"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert finetune.main([*words, "--out", str(whole)]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    expected = lines_of(whole)
    steps, rest = divmod(len(expected), 2)
    assert not rest and "about 150 tokens a step" in plan and f"an epoch has {steps} steps" in plan
    assert "microbatches of at most 60" in plan
    first = expected[:steps]
    assert sum(line["sequences"] for line in first) == 80
    assert sum(line["tokens"] for line in first) == sum(line["tokens"] for line in expected[steps:])
    assert len({line["sequences"] for line in expected}) > 2

    assert finetune.main([*words, "--out", str(run), "--stop-after", str(steps // 2)]) == 0
    for end in (steps + 1, 2 * steps):
        assert finetune.main(["--resume", str(run), "--stop-after", str(end)]) == 0
    for name in ("loss", "grad_norm", "sequences", "tokens"):
        assert [line[name] for line in lines_of(run)] == [line[name] for line in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "8"], "--batch 8 and --batch-tokens 150 both say how large a step is"),
        (["--microbatch", "2"], "--microbatch 2 counts sequences"),
        (["--batch-tokens", "9"], "--batch-tokens 9 is less than the"),
        (["--microbatch-tokens", "9"], "--microbatch-tokens 9 is less than the"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], message: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    asked = ["--task", "classify", "--train", texts, *SIZES, "--batch-tokens", "150", *words]
    assert finetune.main([*asked, "--out", str(run)]) != 0
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in " ".join(error.split())
    assert not run.exists()


def test_text_of_equal_sequences_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "text.txt"
    data.write_text("a text, and more of it. " * 100)
    asked = ["--data", str(data), "--tokenizer", "byte", "--batch-tokens", "512"]
    assert train.main([*asked, *SIZES, "--out", str(run)]) != 0
    error = " ".join(capsys.readouterr().err.split())
    assert "--batch-tokens 512 needs examples or pairs of unequal lengths" in error
    assert not run.exists()


@pytest.mark.slow
@needs_mpirun
def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    """Train on two ranks with ZeRO, and go on on two others, whose layers are cut."""
    data = tmp_path / "train.jsonl"
    rows = [json.dumps({"tokens": each.tokens, "tags": each.tags}) for each in journeys()[:100]]
    data.write_text("\n".join(rows[:80]) + "\n")
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows[80:]) + "\n")
    asked = ["--task", "tag", "--train", str(data), "--dev", str(other), *SIZES]
    asked += ["--context", "48", "--batch-tokens", "120", "--steps", "12", "--eval-every", "6"]
    asked += ["--dtype", "float64"]
    check_ranks([*asked], ["--tp", "2", "--sequence-parallel"], str(other), 20, tmp_path)
