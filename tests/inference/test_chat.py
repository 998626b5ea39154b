"""Chat: templates by the text that transformers' templates make, the cache kept between turns."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from training_helpers import INIT_STD, Layout, make_config

from minillm.base.errors import CheckpointError, ConfigError
from minillm.comm.threads import run_ranks
from minillm.data.templates import CHATML, WORDS, Message, template_of
from minillm.data.tokenizers import ByteTokenizer, tokenizer_from_json
from minillm.inference import chat
from minillm.inference.chat import Conversation
from minillm.inference.decoding import continued
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.inference.writing import Writer, WritingOptions
from minillm.training.assembly import Assembly, assemble
from minillm.weights import turns

RUN = str(Path(__file__).parents[1] / "checkpoint" / "saved_by_e77a9ad")
TALK = [
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello."),
    Message("user", "Who?"),
]


def test_plain_templates_are_the_documented_texts() -> None:
    assert CHATML.render(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert WORDS.render(TALK) == (
        "Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Who?\n\nAssistant:"
    )


def test_a_template_that_fails_is_one_error() -> None:
    pytest.importorskip("jinja2")
    for template, words in (
        ("{{ raise_exception('no tools') }}", "chat template of this model failed: no tools"),
        ("{% for", "malformed"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "failed: .*unsafe"),
        ("{{ messages[7].content.x }}", "failed: "),
    ):
        with pytest.raises(ConfigError, match=words):
            template_of({"chat": {"template": template}}, "auto").render(TALK)


def test_a_model_without_a_template_gets_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    added = [{"id": 3, "content": "<|im_start|>"}]
    assert template_of({"tokenizer": {"added_tokens": added}}, "auto") is CHATML
    assert template_of({"kind": "byte"}, "auto") is WORDS
    assert template_of({"chat": {"template": "{% for"}}, "plain") is WORDS
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(ConfigError, match=r"pip install 'minillm-mpi\[chat\]', or use --template"):
        template_of({"chat": {"template": "x"}}, "auto")


def test_files_say_ends_and_templates(tmp_path: Path) -> None:
    def read(path: Path) -> Any:
        return json.loads(path.read_text())

    def found(config: dict[str, Any] | None = None) -> dict[str, Any]:
        return turns.of_folder(tmp_path, config or {}, read)

    assert found() == {} and found({"eos_token_id": 7}) == {"ends": [7]}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert found({"eos_token_id": 7}) == {"ends": [5, 6]}
    settings: dict[str, Any] = {
        "chat_template": "T", "bos_token": {"content": "<s>"}, "eos_token": "</s>",
    }  # fmt: skip
    chat_ = {"template": "T", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert found() == {"ends": [5, 6], "chat": chat_}
    settings["chat_template"] = [
        {"name": "tool", "template": "U"},
        {"name": "default", "template": "D"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert found()["chat"] == chat_ | {"template": "D"}
    (tmp_path / "chat_template.jinja").write_text("J")
    assert found()["chat"] == chat_ | {"template": "J"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja cannot be read"):
        found()
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<s>", "</s>", "<eot>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.chat_template": "T",
    }
    assert turns.of_gguf(metadata) == {"ends": [2, 3], "chat": chat_}
    assert turns.of_gguf({}) == {}


def test_a_vocabulary_keeps_them() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    value = {
        "kind": "hf", "name": "t",
        "tokenizer": {"model": model, "pre_tokenizer": level, "decoder": level},
        "ends": [0], "chat": {"template": "T"},
    }  # fmt: skip
    kept = tokenizer_from_json(value).to_json()
    assert kept["ends"] == [0] and kept["chat"] == {"template": "T"}


OPTIONS = WritingOptions(tokens=6, temperature=1.3, seed=2)


def talked(made: Assembly) -> tuple[list[str], list[int]]:
    """Return the replies to three turns, and the positions that each of them read."""
    writer, read = Writer(made, ByteTokenizer(), OPTIONS), list[int]()
    conversation = Conversation(writer, WORDS, "Be brief.")
    run = writer.generator.scores

    def counted(batches: Any) -> Any:
        read.append(sum(batch.where.times.shape[-1] for batch in batches))
        return run(batches)

    writer.generator.scores = counted  # type: ignore[method-assign]
    return [conversation.reply(conversation.turn(text)) for text in ("Hi", "So?", "Ah")], read


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
def test_a_turn_is_read_once_and_the_replies_are_those_of_whole_texts(layout: Layout) -> None:
    def ranks(layout: Layout, work: Any) -> list[Any]:
        config = make_config("llama", layout, layers=2, context=512, vocab=256)
        return run_ranks(layout.num_ranks, lambda comm: work(assemble(config, comm, std=INIT_STD)))

    results = ranks(layout, talked)
    assert all(each == results[0] for each in results)
    replies, read = results[0]

    def check(made: Assembly) -> None:
        text = "Be brief.\n\n"
        for turn, reply in zip(("Hi", "So?", "Ah"), replies, strict=True):
            text += f"User: {turn}\n\nAssistant:"
            ids = list(text.encode())
            rule = Sampling(temperature=1.3)
            (written,) = continued(Generator(made), [ids], 6, rule, seed=2)
            assert bytes(written).decode(errors="replace") == reply
            text += f" {reply.strip()}\n\n"

    ranks(Layout(), check)
    assert read.count(1) == 15  # five tokens of each reply; the sixth is not read
    firsts = [size for size in read if size > 1]
    assert len(firsts) == 3 and firsts[0] == len("Be brief.\n\nUser: Hi\n\nAssistant:")
    assert all(size <= 1 + 6 * 3 + len("\n\nUser: So?\n\nAssistant:") for size in firsts[1:])


def test_old_turns_are_forgotten_when_the_context_is_full() -> None:
    def rank(made: Assembly) -> list[tuple[int, bool]]:
        conversation = Conversation(Writer(made, ByteTokenizer(), OPTIONS), WORDS, None)
        found = []
        for number in range(6):
            turn = conversation.turn(f"turn {number}")
            text = bytes(turn.ids).decode(errors="replace")
            found.append((turn.skipped, f"turn {number}" in text))
            assert len(turn.ids) <= 90 - 6
            conversation.reply(turn)
        conversation.reset()
        assert conversation.turn("a").ids == list(b"User: a\n\nAssistant:")
        return found

    config = make_config("gpt2", Layout(), layers=2, context=90, vocab=256)
    (found,) = run_ranks(1, lambda comm: rank(assemble(config, comm, std=INIT_STD)))
    skipped = [number for number, _ in found]
    assert skipped[:2] == [0, 0] and skipped[-1] >= 4 and all(seen for _, seen in found)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def program(text: str, *argv: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert chat.main([RUN, "--tokens", "5", *argv]) == status
        return capsys.readouterr()

    return program


def test_piped_lines_are_turns(talk: Any) -> None:
    out, err = talk("a\n\n/reset\na\n/what\n/quit\nnever\n", "--temperature", "2")
    assert len(out) % 2 == 0 and out[: len(out) // 2] == out[len(out) // 2 :]  # two equal replies
    assert "note: the model has no chat template; plain is used" in err
    assert "error: /what is no command; /reset forgets the conversation, /quit ends" in err
    again, _ = talk("a\na\n", "--temperature", "2", "--template", "chatml")
    assert again[: len(out) // 2] != again[len(out) // 2 :]


def test_a_turn_that_is_too_long_says_so(talk: Any) -> None:
    # 10 characters and the 18 of the words around them; the context is 16.
    _, err = talk("0123456789\n")
    assert "note: the turn has 28 tokens; the model reads the last 8" in err


def test_a_bad_turn_does_not_end_the_chat(talk: Any) -> None:
    out, err = talk("\ud800\na\n")
    assert "error: the text has U+D800" in err and out
