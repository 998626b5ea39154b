"""Parity of the reader with BertForQuestionAnswering of the package transformers."""

from __future__ import annotations

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
    check_grads,
    check_steps,
    encoder_config,
    renamed,
    trainer_of,
    twin_of,
)
from training_helpers import Layout  # noqa: E402

from minillm.autograd.backward import backward  # noqa: E402
from minillm.base.device import CPU  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.data.squad import Answer, Question  # noqa: E402
from minillm.data.tokenizers import make_tokenizer  # noqa: E402
from minillm.models.reader import FAMILY  # noqa: E402
from minillm.tasks.answering import Answering  # noqa: E402
from minillm.tasks.windows import EncodedQuestions, QuestionEncoder  # noqa: E402
from minillm.training.resolve import ResolvedConfig  # noqa: E402

STRIDE = 4
HEADS = ("qa_outputs", "spans")  # names of the head
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIAL, "in", "bath", "ann", "lee", "un", "##ann", "##in", "##s", ".", "-", "a", "b"]
TOKENS += ["##b", "##c", "e"]
WORDS = ["in", "Bath", "Anns", "unann", "\u00c9", ".", "b-a", "abc", "Lee", "zzz", "annin"]


def questions(number: int = 16) -> list[Question]:
    """Return questions of one or two words, about contexts of which most have several windows."""
    rng, found = np.random.default_rng(1), []
    for i in range(number):
        words = rng.choice(WORDS, rng.integers(2, 14)).tolist()
        first = int(rng.integers(0, len(words)))
        text = " ".join(words[first : first + int(rng.integers(1, 4))])
        start = len(" ".join([*words[:first], ""]))
        answers = () if i % 6 == 5 else (Answer(text, start),)
        asked = " ".join(rng.choice(WORDS, rng.integers(1, 3)))
        found.append(Question(str(i), asked, " ".join(words), answers))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return path


@pytest.fixture(scope="module")
def windows(folder: Path) -> EncodedQuestions:
    tokenizer: Any = make_tokenizer(f"special:{folder}", "")
    return QuestionEncoder(tokenizer, CONTEXT, STRIDE).encode(questions(), "the test")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> list[dict[str, Any]]:
    """Return the arguments of their model for each window, by the recipe of its documentation."""
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    found = []
    for each in questions():
        room = CONTEXT - 3 - len(tokenizer.tokenize(each.question))
        encoded = tokenizer(
            each.question,
            each.context,
            max_length=CONTEXT,
            truncation="only_second",
            stride=room - STRIDE,  # the overlap
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for row, offsets in enumerate(encoded["offset_mapping"]):
            ids, types = encoded["input_ids"][row], encoded["token_type_ids"][row]
            inside = [i for i, which in enumerate(encoded.sequence_ids(row)) if which == 1]
            span = (0, 0)
            if each.answers:
                text, start = each.answers[0]
                end = start + len(text)
                if offsets[inside[0]][0] <= start and end <= offsets[inside[-1]][1]:
                    first = max(i for i in inside if offsets[i][0] <= start)
                    last = min(i for i in inside if offsets[i][1] >= end)
                    span = (first, last)
            arguments = dict(input_ids=ids, token_type_ids=types)
            arguments |= dict(start_positions=span[0], end_positions=span[1])
            found.append({name: torch.tensor([value]) for name, value in arguments.items()})
    return found


@pytest.fixture
def twin() -> Any:
    return twin_of("BertForQuestionAnswering", len(TOKENS))


def config_of(layout: Layout) -> ResolvedConfig:
    return encoder_config(FAMILY, layout, len(TOKENS))


def task_of(windows: EncodedQuestions) -> Answering:
    return Answering(windows, CONTEXT, BATCH, 7, 0, True)


def mean_loss(twin: Any, rows: list[dict[str, Any]]) -> Any:
    """Return the mean of the losses of rows that are read one by one, without padding."""
    return sum(twin(**row).loss for row in rows) / len(rows)


def test_windows_and_spans(windows: EncodedQuestions, theirs: list[dict[str, Any]]) -> None:
    assert len(windows) == len(theirs) > len(questions()) + 5
    for number, row in enumerate(theirs):
        length, window = windows.lengths[number], windows.windows[number]
        ids = windows.contexts[window.question].ids[window.first : window.first + window.size]
        own = [*windows.heads[window.question], *ids, windows.sep]
        assert own == row["input_ids"][0].tolist() and length == len(own)
        expected = (int(row["start_positions"]), int(row["end_positions"]))
        assert window.span == expected, questions()[window.question]
    spans = [window.span for window in windows.windows]
    assert 5 < sum(span == (0, 0) for span in spans) < len(spans) - 5


def test_loss_scores_and_gradients(
    windows: EncodedQuestions, theirs: list[dict[str, Any]], twin: Any
) -> None:
    """Compare a step of 8 windows of unequal lengths, theirs one by one."""
    given = Given(twin, *HEADS)
    trainer = trainer_of(SelfCommunicator(), config_of(Layout()), task_of(windows), given)
    batch, stage = trainer.task.batch(0, np.arange(BATCH), CPU), trainer.model.stages[0]
    rows = [theirs[i] for i in trainer.task.rows(0)]  # type: ignore[attr-defined]
    expected = mean_loss(twin, rows)
    expected.backward()
    stage.buffers.start_step()
    found = stage.model.forward((), batch, False)
    backward([(found.losses["loss"], np.ones(()))])
    assert abs(float(found.losses["loss"].data) - expected.item()) <= 1e-12
    for row, scores in zip(rows, found.outputs[1].data, strict=True):
        own = twin(**row)
        both = torch.stack([own.start_logits[0], own.end_logits[0]], -1).detach().numpy()
        np.testing.assert_allclose(scores[: len(both)], both, rtol=0, atol=1e-11)
    grads = renamed({name: p.grad.numpy() for name, p in twin.named_parameters()}, *HEADS)
    check_grads(stage, grads, ("qkv.bias", "spans.bias", "blocks.3.norm2.bias"))


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2, num_microbatches=2)], ids=str
)
def test_ten_steps(
    layout: Layout, windows: EncodedQuestions, theirs: list[dict[str, Any]], twin: Any
) -> None:
    """Train on the same batches with AdamW and clipping; every loss is that of PyTorch."""
    order = task_of(windows)

    def loss_of(step: int) -> Any:
        return mean_loss(twin, [theirs[i] for i in order.rows(step)])

    given = Given(twin, *HEADS)
    check_steps(layout, config_of(layout), lambda: task_of(windows), given, twin, loss_of)
