"""Written texts and their scores: the same on any mesh, and those of the texts themselves."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.seq2seq_helpers import options
from mpi_helpers import mpirun_calls, needs_mpirun
from training_helpers import VOCAB, Layout, make_config

import minillm
from minillm import evaluate, train
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.tokenizers import CharTokenizer
from minillm.inference import translate, written
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Rule
from minillm.inference.translator import GREEDY
from minillm.inference.written import (
    SummaryOptions,
    SummaryWriter,
    TranslationWriter,
    score_rows,
    text_scores,
)
from minillm.metrics.bleu import BLEU
from minillm.metrics.chrf import ChrF
from minillm.models.seq2seq import FAMILY
from minillm.training.assembly import assemble

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
assert len(LETTERS) == VOCAB - 1  # the last id begins and ends
METRICS = (BLEU("char"), ChrF())


def pairs() -> list[tuple[str, str]]:
    """Return sources of unequal lengths, an empty one and one beyond the context among them."""
    rng, found = np.random.default_rng(3), []
    for length in [*rng.integers(1, 15, 11), 0, 40]:
        both = ("".join(rng.choice(list(LETTERS), n)) for n in (length, rng.integers(1, 20)))
        found.append((next(both), next(both)))
    return found


def scored(layout: Layout, rule: Rule, batch: int = 3) -> list[tuple[np.ndarray, int]]:
    """Return what each rank finds for texts of untrained weights, and the texts that it counted."""
    config = dataclasses.replace(
        make_config("gpt2-untied", layout), family=FAMILY, model=options("pre").resolve(VOCAB)
    )

    def rank(comm: Communicator) -> tuple[np.ndarray, int]:
        model, done = assemble(config, comm, training=False, std=0.25), list[int]()
        write = TranslationWriter(model, CharTokenizer(LETTERS), rule, None)
        rows = score_rows(write, pairs(), METRICS, batch, model, comm, done.append)
        assert comm.rank or sum(done) == len(pairs())
        return rows, write.num_cut

    return run_ranks(layout.num_ranks, rank)


RULES = {"greedy": GREEDY, "beam": Beam(BeamOptions(beam=3, length_penalty="gnmt", alpha=0.6))}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "layout",
    [
        *(Layout(dp=2), Layout(dp=4), Layout(tp=2), Layout(pp=2), Layout(dp=2, tp=2)),
        Layout(dp=2, pp=2),
    ],
    ids=str,
)
def test_every_mesh_finds_the_same_scores(layout: Layout, rule: str) -> None:
    ((expected, cut),) = scored(Layout(), RULES[rule])
    wanted, found = text_scores(METRICS, expected), scored(layout, RULES[rule])
    assert cut == 1 == sum(each for _, each in found) // (layout.num_ranks // layout.dp)
    assert wanted["bleu"] > 0 and len(set(map(tuple, expected))) > 8
    for rows, _ in found:
        np.testing.assert_array_equal(rows, expected)
        assert text_scores(METRICS, rows) == wanted


def test_counts_are_those_of_each_text_alone() -> None:
    """Compare with texts that are written one at a time, counted by hand."""
    ((rows, _),) = scored(Layout(), GREEDY)
    config = dataclasses.replace(
        make_config("gpt2-untied", Layout()), family=FAMILY, model=options("pre").resolve(VOCAB)
    )

    def rank(comm: Communicator) -> list[str]:
        model = assemble(config, comm, training=False, std=0.25)
        write = TranslationWriter(model, CharTokenizer(LETTERS), GREEDY, None)
        return [write([source])[0] for source, _ in pairs()]

    (texts,) = run_ranks(1, rank)
    assert texts[-2] == "" and any(texts)
    for row, text, (_, reference) in zip(rows, texts, pairs(), strict=True):
        letters, wanted = text.replace(" ", ""), reference.replace(" ", "")
        assert row[:2].tolist() == [len(letters), len(wanted)]
        both = sum(min(letters.count(c), wanted.count(c)) for c in set(letters))
        assert row[2] == both and row[6] == len(letters)


def test_counts_that_are_averaged_by_replica_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the mean of means: replicas have unequal numbers of texts, so BLEU changes as well."""
    original = written.own_rows

    def averaged(*args: Any) -> np.ndarray:
        rows = original(*args)
        return rows / sum(map(len, args[3]))  # of the texts that this replica writes

    ((expected, _),) = scored(Layout(), GREEDY)
    monkeypatch.setattr(written, "own_rows", averaged)
    with pytest.raises(AssertionError):
        test_every_mesh_finds_the_same_scores(Layout(dp=2), "greedy")
    rows, _ = scored(Layout(dp=2), GREEDY)[0]
    wanted, found = (text_scores(METRICS, each)["bleu"] for each in (expected, rows))
    assert abs(found - wanted) > 1e-3


def summarised(layout: Layout, batch: int = 3, **changes: Any) -> list[tuple[np.ndarray, int]]:
    """Return the same for lines that a decoder of untrained weights writes behind sources."""
    config, letters = make_config("llama", layout), LETTERS.replace(".", "\n")
    some = [(source.replace(".", "a"), reference) for source, reference in pairs() if source]
    asked = SummaryOptions(source="a", target="b", separator=" x", most_tokens=4, **changes)

    def rank(comm: Communicator) -> tuple[np.ndarray, int]:
        model = assemble(config, comm, training=False, std=0.25)
        write = SummaryWriter(model, CharTokenizer(letters), asked)
        return score_rows(write, some, METRICS, batch, model, comm), write.num_cut

    return run_ranks(layout.num_ranks, rank)


@pytest.mark.parametrize("layout", [Layout(dp=4), Layout(dp=2, tp=2), Layout(pp=2)], ids=str)
def test_every_mesh_finds_the_same_scores_of_a_decoder(layout: Layout) -> None:
    for changes in ({}, {"beam": 3}):
        ((expected, cut),) = summarised(Layout(), **changes)
        found = summarised(layout, **changes)
        assert cut == sum(each for _, each in found) // (layout.num_ranks // layout.dp) > 1
        assert len(set(map(tuple, expected))) > 5 and expected[:, 0].max() <= 4
        for rows, _ in found:
            np.testing.assert_array_equal(rows, expected)


# Programs


def write_lines(path: Path, lines: list[str]) -> str:
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a run that answers vowels and other letters differently, and its two files."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(2)
    lines = [" ".join(rng.choice(list("aeioubdfg"), rng.integers(1, 4))) for _ in range(324)]
    targets = ["o i e a u" if line[0] in "aeiou" else "b b d f" for line in lines]
    files = [write_lines(folder / f"train.{s}.gz", x) for s, x in (("a", lines), ("b", targets))]
    words = ["--model", "seq2seq", "--source", files[0], "--target", files[1], "--steps", "120"]
    words += ["--encoder-layers", "1", "--decoder-layers", "1", "--dim", "32", "--context", "12"]
    words += ["--batch", "32", "--lr", "1e-2", "--threads", "1", "--label-smoothing", "0"]
    assert train.main([*words, "--tokenizer", "char", "--out", str(folder / "run")]) == 0
    return folder / "run", files


def numbers(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate.main([*words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_scores_of_a_run_are_those_of_its_translations(
    trained: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = trained
    lines = ["a e i", "u b", "d f g", "b b d", "e i u"]
    source = write_lines(tmp_path / "new.a.gz", lines)
    target = write_lines(tmp_path / "new.b.gz", ["o i e a u", "o i e b", "b d f", "b b d f", "o"])
    asked = ["--source", source, "--target", target, "--threads", "1"]
    found = numbers(capsys, str(run), *asked)
    assert 0 < found["loss"] < 3 and found["texts"] == 5 and found["beam"] == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert translate.main([str(run), "--threads", "1", "--batch", "2"]) == 0
    hypotheses = write_lines(tmp_path / "out", capsys.readouterr().out.splitlines())
    texts = numbers(capsys, "--hypotheses", hypotheses, "--target", target)
    assert texts["chrf"] > 5 and texts["bleu"] > 1 and texts["texts"] == 5
    assert {name: found[name] for name in texts} == texts
    assert texts["bleu_signature"] == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
    beams = ["--beam", "3", "--length-penalty", "gnmt", "--alpha", "0.6"]
    found = numbers(capsys, str(run), *asked, *beams, "--metric", "rouge")
    assert found["beam"] == 3 and found["alpha"] == 0.6 and "bleu" not in found
    assert found["rouge1_95"][0] <= found["rouge1"] <= found["rouge1_95"][1]
    assert "texts" not in numbers(capsys, str(run), *asked, "--metric", "none")
    # Without files the held-out part of training is written; --tokens limits it.
    assert numbers(capsys, str(run), "--threads", "1")["texts"] == 324 // 20
    assert numbers(capsys, str(run), "--threads", "1", "--tokens", "20")["texts"] == 2


def test_the_end_of_a_training_prints_the_scores_that_evaluate_finds(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    again = ["--resume", str(run), "--steps", "121", "--eval-bleu", "99", "--sample-tokens", "0"]
    assert train.main(again) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = numbers(capsys, str(run), "--threads", "1")
    low, high = found["chrf_95"]
    chrf = f"chrF {found['chrf']:.2f} ({low:.2f} to {high:.2f} with 95 %)"
    assert f"{chrf}, 16 held-out texts translated greedily, {found['bleu_signature']}" in said
    assert f"scores BLEU {found['bleu']:.2f} (" in said and found["bleu"] > 1


def test_long_sources_are_read_in_part_and_counted(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a b", "a " * 9 + "b", "d f"]
    files = [write_lines(tmp_path / side, lines) for side in ("a", "b")]
    asked = ["--source", files[0], "--target", files[1], "--threads", "1"]
    assert evaluate.main([str(trained[0]), *asked]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["texts"] == 3 and json.loads(out)["tokens"] == 8
    assert "1 source of 3 did not fit the context of 12 tokens" in err
    write_lines(tmp_path / "a", ["a " * 20])
    write_lines(tmp_path / "b", ["a " * 20])
    assert evaluate.main([str(trained[0]), *asked]) == 1
    assert "all 1 pairs to measure of" in capsys.readouterr().err


@pytest.mark.slow
@needs_mpirun
def test_processes_find_the_scores_of_one(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(trained[0]), "--threads", "1", "--beam", "3"]
    expected = numbers(capsys, *asked)
    layouts = (["--batch", "2"], ["--tp", "2"], ["--pp", "2"])
    for done in mpirun_calls(4, [["minillm.evaluate", *asked, *layout] for layout in layouts]):
        assert done.returncode == 0, done.output
        found = json.loads(done.output.splitlines()[-1])
        for name in ("loss", "perplexity"):
            assert found.pop(name) == pytest.approx(expected[name], rel=1e-5)
        assert found == {name: expected[name] for name in found} and found["bleu"] > 1


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (["a", "b"], ["a"], ["has 2 lines and", "has 1: line 2 of"]),
        (["a", ""], ["a", "b"], ["line 2 of", "is empty"]),
        (["a"], [""], ["line 1 of", "b.gz is empty"]),
        (["a", "x"], ["a", "b"], ["character 'x'"]),
    ],
)
def test_lines_that_are_no_pairs_are_refused(
    source: list[str],
    target: list[str],
    words: list[str],
    trained: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [write_lines(tmp_path / f"{s}.gz", lines) for s, lines in zip("ab", (source, target))]  # noqa: B905
    argv = [str(trained[0]), "--source", files[0], "--target", files[1], "--threads", "1"]
    assert evaluate.main(argv) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and all(word in err for word in words)


def test_hypotheses_that_cannot_be_scored_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_lines(tmp_path / "b", ["x y", "z"])
    empty = write_lines(tmp_path / "empty", ["", ""])  # a model may write nothing
    assert numbers(capsys, "--hypotheses", empty, "--target", target)["bleu"] == 0.0
    # Papineni et al. 2002, example 2: "the" counts twice, as often as in the first reference.
    texts = write_lines(tmp_path / "the", ["the the the the the the the"])
    both = ["The cat is on the mat", "There is a cat on the mat"]
    files = [write_lines(tmp_path / f"{i}.gz", [line]) for i, line in enumerate(both)]
    asked = ["--hypotheses", texts, "--target", files[0], "--target", files[1], "--lowercase"]
    found = numbers(capsys, *asked)
    assert found["bleu_precision_1"] == pytest.approx(200 / 7) and found["texts"] == 1
    assert found["bleu_signature"].startswith("nrefs:2|case:lc|")
    assert found["bleu_brevity_penalty"] == 1.0
    short = write_lines(tmp_path / "a", ["x"])
    for words, message in (
        (["--target", target], "has 1 lines and"),
        (["--target", str(tmp_path / "none")], "No such file"),
        ([], "--target must be given"),
        (["--target", short, "--target", target], "has 1 lines and"),
        (["--target", target, "--metric", "none"], "--metric none scores nothing"),
        (["--target", target, "--metric", "rouge", "--lowercase"], "belongs to --metric bleu"),
        (["--target", target, "--beam", "3"], "--beam"),
    ):
        assert evaluate.main(["--hypotheses", short, *words]) in (1, 2)
        assert message in capsys.readouterr().err


def test_lines_behind_a_separator_are_those_that_generate_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = "abcdefgh"
    sources = [x + y + z for x in letters for y in letters for z in letters[:4]]
    data = tmp_path / "lines.txt"
    data.write_text("".join(f"{source} TL;DR: {source[0]}\n" for source in sources) * 3)
    run, words = str(tmp_path / "run"), ["--tokenizer", "char", "--threads", "1", "--batch", "16"]
    words += ["--layers", "1", "--heads", "2", "--dim", "32", "--context", "32", "--lr", "1e-2"]
    words += ["--data", str(data), "--cache", str(tmp_path), "--steps", "60"]
    assert train.main([*words, "--sample-tokens", "0", "--out", run]) == 0
    source, target = write_lines(tmp_path / "a.gz", sources[::9]), [s[0] for s in sources[::9]]
    references = write_lines(tmp_path / "b.gz", target)
    asked = ["--source", source, "--target", references, "--threads", "1"]
    found = numbers(capsys, run, *asked, "--most-tokens", "6")
    model = minillm.load(run)
    prompts = [f"{source} TL;DR:" for source in sources[::9]]
    texts = model.generate(prompts, tokens=6, temperature=0, stop="\n")
    own = [text.removeprefix(p).strip() for text, p in zip(texts, prompts, strict=True)]
    hypotheses = write_lines(tmp_path / "out", own)
    expected = numbers(
        capsys, "--hypotheses", hypotheses, "--target", references, "--metric", "rouge"
    )
    assert {name: found[name] for name in expected} == expected
    assert expected["rouge1"] > 0.1 and "loss" not in found
    for more, message in (
        (["--source", source], "--source has no counterpart; pass --target"),
        (["--beam", "3"], "--beam is about texts that the model writes"),
        ([*asked, "--most-tokens", "30"], "no room for a source, the separator ' TL;DR:' and 30"),
        ([*asked, "--separator", "!"], "character '!'"),
        ([*asked, "--metric", "none"], "--metric none scores nothing"),
    ):
        assert evaluate.main([run, *more]) in (1, 2)
        assert message in capsys.readouterr().err
