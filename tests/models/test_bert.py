"""Encoder and its data: masks and pairs by their statistics, one answer, planted bugs, overfit."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun
from training_helpers import Layout, Outcome, assert_same, make_config, make_task, train

from minillm import evaluate
from minillm import train as program
from minillm.base.device import CPU
from minillm.base.errors import ConfigError
from minillm.comm.single import SelfCommunicator
from minillm.data.corpus import load_corpus
from minillm.data.documents import Documents, SpecialTokenizer, fitting
from minillm.data.tokenizers import ByteTokenizer, CharTokenizer, IdTokenizer, tokenizer_from_json
from minillm.tasks import masked_language_model
from minillm.tasks.masked_language_model import Examples, Masking
from minillm.training.trainer import Trainer

IDS = SpecialTokenizer(IdTokenizer(50), True)
PAD, CLS, SEP, MASK = IDS.specials


# Masks


def test_shares_of_masks() -> None:
    """Compare with bounds of 4.9 sigma for 200,000 tokens: a false alarm in a million."""
    tokens = np.random.default_rng(0).integers(0, 50, (400, 500))
    seen, selected = Masking(IDS, 0.15, False).masks(tokens, range(400))
    assert abs(selected.mean() - 0.15) <= 0.0039
    hidden, same = seen[selected] == MASK, seen[selected] == tokens[selected]
    assert abs(hidden.mean() - 0.8) <= 0.0113
    assert abs(same.mean() - 0.1 - 0.1 / 50) <= 0.0085  # one of 50 replaced ones is equal
    assert np.array_equal(seen[~selected], tokens[~selected])
    assert set(seen[selected].tolist()) == {*range(50), MASK}  # no other special token is drawn
    special = np.full((20, 500), [PAD, CLS, SEP, MASK, SEP] * 100)
    assert not Masking(IDS, 0.9, False).masks(special, range(20))[1].any()


@pytest.mark.parametrize("kind", ["char", "pieces"])
def test_whole_words_are_selected_together(kind: str) -> None:
    text = "It is a truth, universally acknowledged: 42 men's wives. " * 40
    if kind == "char":
        tokenizer = SpecialTokenizer(CharTokenizer("".join(sorted(set(text)))), False)
        tokens = tokenizer.encode(text)[None].astype(np.int64)
        begins = [not (b.isalnum() and a.isalnum()) for a, b in zip(" " + text, text, strict=False)]
    else:

        class Pieces(IdTokenizer):
            def token(self, token_id: int) -> str:
                return f"##{token_id}" if token_id % 3 else str(token_id)

        tokenizer = SpecialTokenizer(Pieces(30), False)
        tokens = np.random.default_rng(1).integers(0, 30, (1, 2000))
        begins = [token % 3 == 0 for token in tokens[0]]
    _, selected = Masking(tokenizer, 0.3, True).masks(tokens, [5])
    word = np.cumsum(begins)
    for number in range(1, word[-1] + 1):
        inside = selected[0][word == number]
        assert inside.all() or not inside.any(), number
    assert 0.15 < selected.mean() < 0.45
    one_by_one = Masking(tokenizer, 0.3, False).masks(tokens, [5])[1]
    assert any(len(set(one_by_one[0][word == n])) > 1 for n in range(1, word[-1] + 1))


def test_masks_change_with_the_epoch_alone() -> None:
    task = make_task(make_config("bert", Layout()))
    sequences: Any = task.sequences  # type: ignore[attr-defined]
    first, again, later = (sequences.examples([n]) for n in (3, 3, 3 + sequences.number))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.selected, later.selected)


# Documents and pairs


def _numbered(documents: int, sentences: int) -> tuple[np.ndarray, SpecialTokenizer]:
    """Return documents of sentences [d, s, ...], each of three tokens, with marks."""
    tokenizer = SpecialTokenizer(IdTokenizer(200), True)
    _, cls, sep, _ = tokenizer.specials
    rows = [
        [*([d, 100 + s, 150 + s, sep] for s in range(sentences)), [cls, cls]]
        for d in range(documents)
    ]
    return np.array([i for row in rows for part in row for i in part]), tokenizer


def test_pairs_of_numbered_sentences() -> None:
    tokens, tokenizer = _numbered(30, 9)
    documents, number = Documents(tokens, tokenizer.specials, "it"), 1500
    assert len(documents.firsts) == 30 and len(documents.anchors) == 30 * 8
    pairs = [documents.pair(1, n, 60) for n in range(number)]
    lengths: dict[bool, list[int]] = {False: [], True: []}
    for pair in pairs:
        last, first = pair.first[-3:], pair.second[:3]
        follows = last[0] == first[0] and last[1] + 1 == first[1]
        assert pair.unrelated == (not follows) == (last[0] != first[0])
        assert all(len(set(part[part < 100])) == 1 for part in pair[:2])  # one document each
        lengths[pair.unrelated].append(len(pair.first))
    share = len(lengths[True]) / number
    assert abs(share - 0.5) <= 4.9 * np.sqrt(0.25 / number)
    # The lengths of the first segments tell nothing: equal means within 4.9 standard errors.
    means, errors = zip(
        *((np.mean(it), np.var(it) / len(it)) for it in lengths.values()), strict=True
    )
    assert abs(means[0] - means[1]) <= 4.9 * np.sqrt(sum(errors))
    begins = [tuple(pair.first[:2]) for pair in pairs[: len(documents.anchors)]]
    assert len(set(begins)) == len(documents.anchors)  # once each in an epoch


def test_pairs_fit() -> None:
    tokens, tokenizer = _numbered(5, 40)
    documents = Documents(tokens, tokenizer.specials, "it")
    sizes = [(len(p.first), len(p.second)) for p in (documents.pair(2, n, 20) for n in range(300))]
    assert all(a > 0 and b > 0 and a + b <= 20 for a, b in sizes)
    for a in range(1, 30):
        for b in range(1, 30):
            first, second = a, b
            while first + second > 17:  # the definition of Devlin et al.
                first, second = (first - 1, second) if first > second else (first, second - 1)
            assert fitting(a, b, 17) == (first, second)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_a_text_without_pairs_is_refused(shape: tuple[int, int]) -> None:
    tokens, tokenizer = _numbered(*shape)
    words = f"some text has {shape[0]} with at most {shape[1]}; put blank lines"
    with pytest.raises(ConfigError, match=words):
        Documents(tokens, tokenizer.specials, "some text")


def test_files_and_lines_are_documents_of_their_own(tmp_path: Path) -> None:
    texts = ["".join(f"{d} {s}.\n" for s in range(9)) for d in range(4)]
    (tmp_path / "files").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number}.txt").write_text(text.rstrip("\n"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "lines.jsonl").write_text(lines)
    for name in ("files", "lines.jsonl"):
        data = str(tmp_path / name)
        corpus = load_corpus(data, "documents:byte", context=1, val_data=data)
        assert isinstance(corpus.tokenizer, SpecialTokenizer)
        for tokens in (corpus.train, corpus.held_out):
            found = Documents(tokens, corpus.tokenizer.specials, "it")
            assert len(found.firsts) == 4 and len(found.anchors) == 4 * 8
        plain = hashlib.sha256("".join(texts).encode()).hexdigest()
        assert load_corpus(data, "special:byte", context=1).sha256 == plain


def test_marks_of_a_text() -> None:
    tokenizer = SpecialTokenizer(ByteTokenizer(), True)
    _, cls, sep, _ = tokenizer.specials
    ids = tokenizer.encode('One. "Two!" Three\nfour\n\n \nFive')
    assert tokenizer.decode(ids) == ('One.[SEP]"Two!"[SEP]Three[SEP]four[SEP][CLS][CLS]Five[SEP]')
    assert (ids == cls).sum() == 2 and (ids == sep).sum() == 5
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert np.array_equal(again.encode("a\n\nb"), tokenizer.encode("a\n\nb"))


# Training


def _own_divisor(patch: pytest.MonkeyPatch) -> None:
    """Divide by the masked tokens of the microbatch, as a mean of ranks' means does."""
    original = Examples.batch

    def batch(self: Examples, rows: Any, where: Any, divisors: Any) -> Any:
        made = original(self, rows, where, divisors)
        return made._replace(divisors=dict(divisors, mlm=2.0 * len(made.arrays["masked"])))

    patch.setattr(masked_language_model.Examples, "batch", batch)


def _places_of_the_context(patch: pytest.MonkeyPatch) -> None:
    """Count the places of masked tokens in rows of the context, not of the microbatch."""
    original = Examples.batch

    def batch(self: Examples, rows: Any, where: Any, divisors: Any) -> Any:
        made = original(self, rows, where, divisors)
        length, context = made.arrays["tokens"].shape[1], self.tokens.shape[1]
        row, time = np.divmod(made.arrays["masked"], length)
        return made._replace(arrays=dict(made.arrays, masked=row * context + time))

    patch.setattr(masked_language_model.Examples, "batch", batch)


def _forget_key_lengths(patch: pytest.MonkeyPatch) -> None:
    original = Examples.batch
    patch.setattr(
        masked_language_model.Examples,
        "batch",
        lambda *args: original(*args)._replace(limits=None),
    )


SHORT: dict[str, Any] = dict(steps=1, dropout=0.0, context=32)  # pairs of 8 to 32 tokens


@functools.cache
def expected() -> Outcome:
    return train("bert", Layout(), **SHORT)


@pytest.mark.parametrize("plant", [_own_divisor, _places_of_the_context, _forget_key_lengths])
def test_planted_bug_is_caught(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(dp=2, num_microbatches=4)
    if plant is _own_divisor:  # right without the bug, and every parameter has a gradient
        assert_same(train("bert", layout, **SHORT), expected(), 1e-10)
        assert all(np.abs(grad).max() > 0 for grad in expected().first_grads.values())
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        assert_same(train("bert", layout, **SHORT), expected(), 1e-10)


def test_a_microbatch_without_masks_counts_nothing() -> None:
    config = make_config("bert", Layout(), dropout=0.0)
    task: Any = make_task(config)
    examples = task.sequences.examples(range(4))
    examples.selected[:] = False
    task._made = 0, examples
    trainer = Trainer(config, SelfCommunicator(), task)
    batch = task.batch(0, np.arange(4), CPU)
    assert batch.divisors == {"mlm": 1.0, "nsp": 16.0} and len(batch.arrays["masked"]) == 1
    assert float(trainer.model.stages[0].model.forward((), batch, True).losses["mlm"].data) == 0


def test_fixed_masks_are_learnt_by_heart() -> None:
    config = make_config("bert", Layout(), lr=0.01, dropout=0.0, dtype="float32", warmup=5)
    task: Any = make_task(config)
    examples = task._examples(0)
    task._examples = lambda step: examples
    trainer = Trainer(config, SelfCommunicator(), task)
    losses = [trainer.step(step).loss for step in range(40)]
    assert losses[0] > 3 and losses[-1] < 0.1, (losses[0], losses[-1])


# Programs


def test_objectives_and_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="--types 1 cannot tell the two segments"):
        make_config("bert", Layout(), types=1)
    assert make_config("bert", Layout(), types=0, objective="mlm").model.types == 0


def test_a_run_and_its_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"This is {n}.\nThen {n + 1}. And {n + 2}." for n in range(60))
    Path("book.txt").write_text(text)
    sizes = ["--layers", "1", "--dim", "8", "--heads", "2", "--context", "32", "--batch", "4"]
    words = ["--model", "bert", *sizes, "--data", "book.txt", "--steps", "2", "--eval-every", "1"]
    for objective in ("mlm+nsp", "mlm"):
        more = ["--objective", objective, "--whole-word", "--out", objective]
        assert program.main([*words, *more]) == 0
        said = capsys.readouterr().out
        assert "of masked tokens right" in said and ("documents" in said) == (objective != "mlm")
        assert evaluate.main([objective]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["masked"] > 0 and (found["pair_accuracy"] is None) == (objective == "mlm")
        lines = Path(objective, "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["val_loss"] == pytest.approx(found["loss"], rel=1e-5)
    Path("book.txt").write_text(text.replace("\n\n", "\n"))
    assert program.main([*words, "--out", "new"]) == 1
    assert "the training part of book.txt has 1 with" in " ".join(capsys.readouterr().err.split())
    assert not Path("new").exists()


@needs_mpirun
@pytest.mark.slow
def test_four_processes_give_what_one_gives(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--dim", "16", "--context", "32", "--batch", "8", "--steps", "3"]
    words = ["-m", "minillm.train", "--model", "bert", *sizes, "--dtype", "float64"]
    found = []
    for number, layout in enumerate(([], [], ["--tp", "2", "--pp", "2", "--sequence-parallel"])):
        out = tmp_path / str(number)
        done = mpirun(4 if number else 1, [*words, *layout, "--out", str(out)])
        assert done.returncode == 0, done.output
        lines = (out / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-10)
