"""Answers of dialogues: what is learnt, one loss on every mesh, bad rows, and runs of a user."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import lines_of
from training_helpers import Layout, assert_same, make_config, train

from minillm import evaluate, finetune
from minillm.autograd.tape import no_grad
from minillm.base.errors import ConfigError
from minillm.comm.single import SelfCommunicator
from minillm.data.batches import IGNORE_INDEX
from minillm.data.dialogues import Dialogue, errands, read_dialogues
from minillm.data.templates import (
    CHATML,
    TLDR,
    WORDS,
    Message,
    Template,
    chunks_of,
    template_of,
)
from minillm.data.tokenizers import ByteTokenizer, CharTokenizer
from minillm.inference import chat, sample
from minillm.inference.decoding import Request
from minillm.inference.sampling import Sampling
from minillm.inference.written import SummaryOptions
from minillm.params.where import Where
from minillm.tasks import chat as tasks_chat
from minillm.tasks.chat import (
    ChatOptions,
    Chatting,
    Dialogues,
    EncodedDialogues,
    HeldOutDialogues,
    encoded,
)
from minillm.training.held_out import measure
from minillm.training.trainer import Trainer

TALK = [
    *(Message("system", "Be kind."), Message("user", "hi"), Message("assistant", "hello")),
    *(Message("user", "2+2?"), Message("assistant", "4"), Message("user", "thanks")),
]
NONE: frozenset[int] = frozenset()


def learnt_text(template: Template, messages: list[Message], ends: frozenset[int] = NONE) -> str:
    """Return the text of a dialogue with what is learnt of it in brackets."""
    ids, marks = encoded(messages, ByteTokenizer(), template, ends)
    edges = np.flatnonzero(np.diff([False, *marks, False]))
    parts, at = [], 0
    for number, edge in enumerate(edges):
        parts += [bytes(ids[at:edge].tolist()).decode(), "[]"[number % 2]]
        at = edge
    return "".join([*parts, bytes(ids[at:].tolist()).decode()])


def test_answers_and_what_ends_them_are_learnt() -> None:
    assert learnt_text(WORDS, TALK) == (
        "Be kind.\n\nUser: hi\n\nAssistant:[ hello\n\nUser:] 2+2?\n\nAssistant:[ 4\n\nUser:]"
    )
    assert learnt_text(CHATML, TALK) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n[hello<|im_end|>]\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[4<|im_end|>]"
    )
    twice = [TALK[1], TALK[2], Message("assistant", "and welcome")]
    assert learnt_text(WORDS, twice) == (
        "User: hi\n\nAssistant:[ hello\n\n]Assistant:[ and welcome\n\nUser:]"
    )


def test_a_loss_on_the_prompt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_it(*of: Any) -> Any:
        return (chunk._replace(learnt=True) for chunk in chunks_of(*of))

    monkeypatch.setattr(tasks_chat, "chunks_of", all_of_it)
    with pytest.raises(AssertionError):
        test_answers_and_what_ends_them_are_learnt()


def test_a_template_of_a_model_ends_answers_by_its_ids() -> None:
    pytest.importorskip("jinja2")
    turns = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}~\n{% endfor %}"
    own = {"chat": {"template": turns + "{% if add_generation_prompt %}a:{% endif %}"}}
    found = learnt_text(template_of(own, "auto"), TALK[1:5], frozenset(b"~"))
    assert found == "u:hi~\na:[hello~]u:2+2?~\na:[4~]".replace("]u", "]\nu")
    last = {"chat": {"template": "{{ messages[-1].content }}"}}
    with pytest.raises(ConfigError, match="alters the text of a turn once others follow"):
        learnt_text(template_of(last, "auto"), TALK[1:5])


def test_a_summary_is_learnt_behind_what_evaluate_gives_to_read() -> None:
    pair = [Message("user", "a long story"), Message("assistant", "its end")]
    assert learnt_text(TLDR, pair) == "a long story TL;DR:[ its end\n]"
    assert next(chunks_of(TLDR, pair)).text == pair[0].content + SummaryOptions().separator
    pair[1] = Message("assistant", "one line\nand no more")
    assert learnt_text(TLDR, pair) == "a long story TL;DR:[ one line\n]"


CHARACTERS = CharTokenizer("\n?+AUabcdefghiklnorstuwxy245")  # at most 29, as the small models have


@cache
def dialogues() -> EncodedDialogues:
    """Return dialogues of unequal lengths, some longer than the context."""
    rng, made = np.random.default_rng(4), []
    for line in range(40):
        words = ["".join(rng.choice(list("abcdef"), rng.integers(1, 9))) for _ in range(2)]
        made.append(Dialogue((Message("user", words[0]), Message("assistant", words[1])), line))
    head, tail = {"user": "U", "assistant": "A"}, {"user": "\n", "assistant": "\n"}
    short = WORDS.__class__("short", head, tail, ("\n",))
    return EncodedDialogues(made, CHARACTERS, short, NONE, 16)


def chatting() -> Chatting:
    rows = dialogues()
    assert rows.num_cut > 2 and len(set(rows.counts)) > 4
    return Chatting(rows, 16, 16, 3, 0, True)


@pytest.mark.parametrize(
    ("at", "method"),
    [
        (Layout(dp=2), {}),
        (Layout(tp=2, sp=True), {}),
        (Layout(pp=2, num_microbatches=2), {}),
        (Layout(dp=2, tp=2), {}),
        (Layout(dp=2, num_microbatches=4), {"zero": 2}),
        (Layout(dp=2), {"zero": 3}),
    ],
    ids=str,
)
def test_dialogues_are_learnt_alike_on_every_mesh(at: Layout, method: dict[str, Any]) -> None:
    more = {"optimizer": "adamw", "options": {"task": chatting()}, "dropout": 0.0}
    assert_same(train("gpt2", at, **more, **method), train("gpt2", Layout(), **more), 1e-9)


def test_the_loss_is_the_mean_over_the_tokens_of_answers() -> None:
    config = make_config("gpt2", Layout(), dropout=0.0)
    task, rows = chatting(), dialogues()
    trainer = Trainer(config, SelfCommunicator("test"), task, std=0.25)
    model = trainer.model.stages[0].model
    losses = []
    for number in range(len(rows)):  # alone, without padding, from the logits
        length, row = int(rows.lengths[number]), np.array([number])
        where = Where(0, row, np.arange(length))
        one = rows.batch(row, 10_000, where, {})
        cut = {name: array[:, :length] for name, array in one.arrays.items()}
        alone = one._replace(arrays=cut, where=where)
        with no_grad():
            found = model.forward((), alone, False)
        logits = model.logits(found.outputs, alone)[0]
        logits = logits - logits.max(-1, keepdims=True)
        shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        counted = cut["targets"][0] != IGNORE_INDEX
        losses.append(-shares[np.flatnonzero(counted), cut["targets"][0][counted]])
    mean = float(np.concatenate(losses).mean())
    held = measure(trainer.model, HeldOutDialogues(rows, 16, None), SelfCommunicator("test"), 7)
    assert held.numbers()["loss"] == pytest.approx(mean, rel=1e-12)
    assert held.numbers()["tokens"] == rows.counts.sum() == sum(map(len, losses))
    chosen = np.concatenate([losses[i] for i in task.rows(0)])
    assert trainer.step(0).loss == pytest.approx(float(chosen.mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2 of .* is no JSON"),
        ('["a"]', 'line 2 of .* is no dialogue, as in {"prompt"'),
        ('{"prompt": "a"}', "line 2 of .* is no dialogue"),
        ('{"prompt": "a", "completion": " "}', "a message of the assistant without words"),
        ('{"prompt": 3, "completion": "b"}', "a message of the user without words, but 3"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "role 'tool', not system, user or"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": ["a"]}', "a message of the role None"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
    with pytest.raises(ConfigError, match=words):
        read_dialogues(str(path))


def test_a_sample_ends_with_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Dialogue((Message("user", "first of ant bee"), Message("assistant", "ant")), 1)
    options = ChatOptions(template="plain")
    data = Dialogues([("a", [talk]), ("b", [talk])], ByteTokenizer().to_json(), options, 64)
    asked: list[Request] = []

    def begin(rule: Sampling, request: Request) -> None:
        asked.append(request)

    def write(*more: Any) -> Iterator[None]:
        for token in b" ant\n\nUser: bee of":
            yield
            if not asked[0].accept(token):
                return

    for name in ("Generator", "Rows"):
        monkeypatch.setattr(sample, name, lambda *more: None)
    monkeypatch.setattr(Sampling, "begin", begin)
    monkeypatch.setattr(sample, "decode", write)
    arguments: Any = (None, data, 50, 0, SelfCommunicator(), lambda: False)
    text = sample.continued_text(*arguments)
    assert text.split("---")[2].strip() == "User: first of ant bee\n\nAssistant: ant"


@pytest.mark.slow
def test_a_run_is_read_by_evaluate_and_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = tmp_path / "train.jsonl", tmp_path / "run"
    rows = [{"messages": [m._asdict() for m in each.messages]} for each in errands()[:60]]
    rows[0] = {"prompt": "first of ant bee", "completion": "ant"}
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["--task", "chat", "--train", str(data), "--dev", str(data), "--steps", "6"]
    words += ["--layers", "1", "--heads", "2", "--dim", "16", "--threads", "1", "--batch", "8"]
    words += ["--template", "chatml", "--context", "200", "--dtype", "float64", "--lr", "0.01"]
    assert finetune.main([*words, "--out", str(run), "--stop-after", "3"]) == 0
    assert "template chatml" in " ".join(capsys.readouterr().out.split())
    assert finetune.main(["--resume", str(run), "--stop-after", "6"]) == 0
    assert finetune.main([*words, "--out", str(tmp_path / "whole")]) == 0
    lines, whole = (lines_of(path) for path in (run, tmp_path / "whole"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]
    capsys.readouterr()
    assert evaluate.main([str(run), "--data", str(data), "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(lines[-1]["val_loss"], rel=1e-12)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"first of ant bee\n")))
    assert chat.main([str(run), "--tokens", "8", "--threads", "1"]) == 0
    assert "template" not in capsys.readouterr().err  # it is the one of the training
    again = [*words[:6], "--steps", "1", "--model", str(run), "--threads", "1", "--lora", "2"]
    assert finetune.main([*again, "--out", str(tmp_path / "next"), "--no-truncate"]) == 0
    assert "template chatml" in " ".join(capsys.readouterr().out.split())
    assert finetune.main([*again, "--out", str(tmp_path / "x"), "--context", "8"]) == 1
    assert "begins within --context 8 tokens" in capsys.readouterr().err
    other = ["--task", "classify", "--model", str(run), "--out", str(tmp_path / "y")]
    assert finetune.main(other) == 1
    assert "but this task needs an encoder" in capsys.readouterr().err


def test_summaries_are_learnt_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"tale {i} of old", "completion": f"tale {i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, key in (("a.txt", "prompt"), ("b.txt", "completion")):
        (tmp_path / name).write_text("\n".join(row[key] for row in rows) + "\n")
    words = ["--task", "chat", "--template", "tldr", "--train", str(tmp_path / "pairs.jsonl")]
    words += ["--layers", "1", "--heads", "2", "--dim", "16", "--threads", "1", "--steps", "2"]
    words += ["--context", "64", "--batch", "4", "--out", str(tmp_path / "run")]
    assert finetune.main(words) == 0
    assert "template tldr" in " ".join(capsys.readouterr().out.split())
    asked = ["--source", str(tmp_path / "a.txt"), "--target", str(tmp_path / "b.txt")]
    more = ["--most-tokens", "10", "--threads", "1"]
    assert evaluate.main([str(tmp_path / "run"), *asked, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["rouge1_95"]
    assert found["texts"] == 20 and low <= found["rouge1"] <= high
