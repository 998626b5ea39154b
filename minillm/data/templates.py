"""Templates of chats: the text of a conversation, as a model has learnt to read it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from minillm.base.errors import ConfigError


class Message(NamedTuple):
    """Turn of a conversation."""

    role: str  # system, user or assistant
    content: str


class Template(Protocol):
    """Rule that makes one text of a conversation."""

    @property
    def name(self) -> str:
        """Value of --template that means it."""

    @property
    def stops(self) -> Sequence[str]:
        """Texts that end a reply, besides the ids that end a text."""

    def render(self, messages: Sequence[Message], reply: bool = True) -> str:
        """Return the text; for a `reply` up to where the assistant's next one begins."""


@dataclass(frozen=True)
class Plain:
    """Template for models without one: a head before each turn, a tail behind it."""

    name: str
    head: Mapping[str, str]  # of each role
    tail: Mapping[str, str]  # of each role
    stops: Sequence[str]

    def render(self, messages: Sequence[Message], reply: bool = True) -> str:
        """Return the text; for a `reply` up to where the assistant's next one begins."""
        turns = [f"{self.head[role]}{content}{self.tail[role]}" for role, content in messages]
        return "".join(turns) + self.head["assistant"].rstrip(" ") * reply


ROLES = ("system", "user", "assistant")
CHATML = Plain(
    "chatml",
    {role: f"<|im_start|>{role}\n" for role in ROLES},
    dict.fromkeys(ROLES, "<|im_end|>\n"),
    ("<|im_end|>",),
)
WORDS = Plain(
    "plain",
    {"system": "", "user": "User: ", "assistant": "Assistant: "},
    dict.fromkeys(ROLES, "\n\n"),
    ("\nUser:",),
)
# A summary is a line behind an article and a separator (Radford et al. 2019, section 3.6), which
# `minillm evaluate --source --target` writes as well.
TLDR = Plain(
    "tldr",
    {"system": "", "user": "", "assistant": " TL;DR: "},
    {"system": "\n", "user": "", "assistant": "\n"},
    ("\n",),
)


class Jinja:
    """Template of the model's own files, in Jinja, run in a sandbox.

    Raises ConfigError if the package is missing, and for a template that is malformed.
    """

    name = "auto"
    stops: Sequence[str] = ()

    def __init__(self, template: str, borders: Mapping[str, str]) -> None:
        try:
            import jinja2.sandbox
        except ImportError:
            raise ConfigError(
                "the chat template of this model needs the package jinja2, which is not installed; "
                "install it with: pip install 'minillm-mpi[chat]', or use --template chatml"
            ) from None
        self._error: Any = jinja2.TemplateError
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # What transformers offers its templates.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._borders = {"bos_token": "", "eos_token": "", **borders}
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of this model is malformed: {error}") from None

    def render(self, messages: Sequence[Message], reply: bool = True) -> str:
        """Return the text; for a `reply` up to where the assistant's next one begins.

        Raises ConfigError for a conversation that the template refuses.
        """
        try:
            return self._template.render(
                messages=[message._asdict() for message in messages],
                add_generation_prompt=reply,
                **self._borders,
            )
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(
                f"the chat template of this model failed: {error}; use --template chatml or plain"
            ) from None

    def _raise(self, message: str) -> None:
        raise self._error(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def template_of(vocabulary: Mapping[str, Any], asked: str) -> Template:
    """Return the template `asked` for: chatml, plain, tldr, or auto.

    That is the one that it was trained with here, else its own one. A model without one gets ChatML
    if its vocabulary has the tokens, else words. Raises ConfigError if its own one cannot be used.
    """
    given = {each.name: each for each in (CHATML, WORDS, TLDR)}
    wanted = str(vocabulary.get("template")) if asked == "auto" else asked
    if wanted in given:
        return given[wanted]
    own = vocabulary.get("chat")
    if own is not None:
        return Jinja(own["template"], {k: v for k, v in own.items() if k != "template"})
    added = (vocabulary.get("tokenizer") or {}).get("added_tokens") or ()
    return CHATML if any(token["content"] == "<|im_start|>" for token in added) else WORDS


class Chunk(NamedTuple):
    """Piece of a conversation's text."""

    text: str
    learnt: bool  # the assistant writes it: an answer, and what ends it


def chunks_of(template: Template, messages: Sequence[Message]) -> Iterator[Chunk]:
    """Yield the text of a conversation up to the last answer, in pieces.

    An answer ends with the first of the template's stop texts, which the assistant writes as well.
    Raises ConfigError for a template that alters turns once others follow.
    """
    done, behind = "", ""
    if template.stops:
        behind = template.render([Message("user", "")], reply=False)
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = template.render(messages[:number])
        whole = template.render(messages[: number + 1], reply=False)
        if not (before.startswith(done) and whole.startswith(before)):
            raise ConfigError(
                "the chat template of this model alters the text of a turn once others follow, so "
                "its answers cannot be told from the rest; use --template chatml or plain"
            )
        yield Chunk(before[len(done) :], False)
        answer, follows = whole[len(before) :], f"{whole}{behind}"[len(before) :]
        ends = [at + len(stop) for stop in template.stops if (at := follows.find(stop)) >= 0]
        size = min(ends, default=len(answer.rstrip()))
        last = all(other.role != "assistant" for other in messages[number + 1 :])
        if size > len(answer) and not last:  # the next turn may begin otherwise
            known = template.render(messages[: number + 2], reply=False)[len(before) :]
            size = size if known[:size] == follows[:size] else len(answer)
        yield Chunk(follows[:size], True)
        done = before + follows[:size]
