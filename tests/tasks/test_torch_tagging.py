"""Parity of the tagger with BertForTokenClassification of the package transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "PyTorch or transformers is not installed; .ci/run installs them for these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from torch_encoders import (  # noqa: E402
    BATCH,
    CONTEXT,
    Given,
    bert_config,
    check_grads,
    check_steps,
    encoder_config,
    renamed,
    trainer_of,
    twin_of,
)
from training_helpers import Layout  # noqa: E402

from minillm import finetune  # noqa: E402
from minillm.autograd.backward import backward  # noqa: E402
from minillm.base.device import CPU  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.data.tokenizers import make_tokenizer  # noqa: E402
from minillm.inference import predict  # noqa: E402
from minillm.models.tagger import FAMILY  # noqa: E402
from minillm.tasks.encoded_words import EncodedWords, WordEncoder  # noqa: E402
from minillm.tasks.tagging import Tagging  # noqa: E402
from minillm.training.resolve import ResolvedConfig  # noqa: E402
from minillm.weights import exporting  # noqa: E402

LABELS = 5
HEADS = ("classifier", "tags")  # names of the head
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIAL, "in", "bath", "ann", "lee", "un", "##ann", "##in", "##s", ".", "-", "a", "b"]
TOKENS += ["##b", "##c"]
WORDS = ["in", "Bath", "Anns", "unann", "unin", ".", "b-a", "abc", "bbbbbc", "Lee", "zzz", "annin"]


def words(number: int = 24) -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [rng.choice(WORDS, n).tolist() for n in rng.integers(1, 13, number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return path


@pytest.fixture(scope="module")
def sentences(folder: Path) -> EncodedWords:
    """Return the sentences as minillm encodes them, with random labels."""
    tokenizer: Any = make_tokenizer(f"special:{folder}", "")
    rng, found = np.random.default_rng(2), words()
    labels = [rng.integers(0, LABELS, len(each)) for each in found]
    return EncodedWords(WordEncoder(tokenizer, CONTEXT).encode(found), labels)


def theirs(folder: Path, sentences: EncodedWords, numbers: Any) -> dict[str, Any]:
    """Return the arguments of their model by the recipe of its documentation."""
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    encoded = tokenizer(
        [words()[i] for i in numbers],
        is_split_into_words=True,
        truncation=True,
        max_length=CONTEXT,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full(encoded["input_ids"].shape, -100)
    for row, number in enumerate(numbers):
        before = None
        for at, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != before:
                labels[row, at] = int(sentences.labels[number][word])
            before = word
    return {**encoded, "labels": labels}


@pytest.fixture
def twin() -> Any:
    return twin_of("BertForTokenClassification", len(TOKENS), num_labels=LABELS)


def config_of(layout: Layout) -> ResolvedConfig:
    return encoder_config(FAMILY, layout, len(TOKENS), labels=LABELS)


def task_of(sentences: EncodedWords) -> Tagging:
    return Tagging(sentences, CONTEXT, BATCH, 7, 0, True)


def test_loss_logits_and_gradients(folder: Path, sentences: EncodedWords, twin: Any) -> None:
    """Compare a step of 8 sentences of unequal lengths, one of them cut."""
    given = Given(twin, *HEADS)
    trainer = trainer_of(SelfCommunicator(), config_of(Layout()), task_of(sentences), given)
    batch, stage = trainer.task.batch(0, np.arange(BATCH), CPU), trainer.model.stages[0]
    numbers = trainer.task.rows(0)  # type: ignore[attr-defined]
    given = theirs(folder, sentences, numbers)
    ids = given["input_ids"].numpy()
    np.testing.assert_array_equal(batch.arrays["tokens"][:, : ids.shape[1]], ids)
    expected = twin(**given)
    expected.loss.backward()
    stage.buffers.start_step()
    found = stage.model.forward((), batch, False)
    backward([(found.losses["loss"], np.ones(()))])
    assert abs(float(found.losses["loss"].data) - expected.loss.item()) <= 1e-12
    logits = expected.logits.detach().numpy()[given["labels"].numpy() >= 0]
    np.testing.assert_allclose(found.outputs[1].data, logits, rtol=0, atol=1e-11)
    grads = renamed({name: p.grad.numpy() for name, p in twin.named_parameters()}, *HEADS)
    check_grads(stage, grads)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2, num_microbatches=2)], ids=str
)
def test_ten_steps(layout: Layout, folder: Path, sentences: EncodedWords, twin: Any) -> None:
    """Train on the same batches with AdamW and clipping; every loss is that of PyTorch."""
    order = task_of(sentences)

    def loss_of(step: int) -> Any:
        return twin(**theirs(folder, sentences, order.rows(step))).loss

    given = Given(twin, *HEADS)
    check_steps(layout, config_of(layout), lambda: task_of(sentences), given, twin, loss_of)


NAMES = ["B-x", "I-x", "B-y", "O", "I-y"]  # in no order of minillm


def tags_by(path: Path) -> list[list[str]]:
    """Return the tags that transformers predicts from a folder, at the first piece of each word."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(path).eval()
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(path), []
    for sentence in words():
        encoded = tokenizer(sentence, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        places = [encoded.word_ids(0).index(word) for word in range(len(sentence))]
        found.append([model.config.id2label[best[place]] for place in places])
    return found


def predictions(path: Path, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    (path.parent / "in.jsonl").write_text(
        "".join(json.dumps({"tokens": each}) + "\n" for each in words())
    )
    capsys.readouterr()
    words_ = [str(path), "--input", str(path.parent / "in.jsonl"), "--threads", "1"]
    assert predict.main(words_) == 0
    return [json.loads(line)["tags"] for line in capsys.readouterr().out.splitlines()]


def test_a_tagger_of_transformers_comes_in_and_goes_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predict the same tags from its folder, go on with its head, and export the run."""
    torch.manual_seed(1)
    config = bert_config(
        len(TOKENS),
        64,
        initializer_range=0.3,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    source = tmp_path / "source"
    transformers.BertForTokenClassification(config).save_pretrained(source)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(source)
    expected = tags_by(source)
    assert len({tag for tags in expected for tag in tags}) >= 3
    assert predictions(source, capsys) == expected
    train = "".join(
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*pair, strict=True)) + "\n"
        for pair in zip(words(), expected, strict=True)
    )
    (tmp_path / "train.conll").write_text(train)
    asked = ["--task", "tag", "--model", str(source), "--train", str(tmp_path / "train.conll")]
    asked += ["--steps", "2", "--batch", "8", "--threads", "1", "--out", str(tmp_path / "run")]
    assert finetune.main(asked) == 0
    assert "initial values" not in capsys.readouterr().out
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {
        str(i): name for i, name in enumerate(NAMES)
    }
    assert tags_by(tmp_path / "out") == predictions(tmp_path / "run", capsys)
