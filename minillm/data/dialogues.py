"""Dialogues: conversations of a user and an assistant out of JSON lines, and a generated set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import or_list
from minillm.data.tables import ending, read_text
from minillm.data.templates import ROLES, Message

NUM_GENERATED = 3000
ANIMALS = ("ant", "bee", "cat", "cow", "dog", "elk", "fox", "hen", "owl", "pig", "rat", "yak")


class Dialogue(NamedTuple):
    """Conversation that holds an answer of the assistant."""

    messages: tuple[Message, ...]
    line: int  # in its file, from 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The words that tell it apart from others."""
        return tuple(message.content for message in self.messages)


def read_dialogues(name: str) -> list[Dialogue]:
    """Return the dialogues of a file of JSON lines, plain or .gz.

    A line has a prompt and a completion, or messages with a role and a content each. Raises
    ConfigError with file and line for anything else.
    """
    if ending(name) != ".jsonl":
        raise ConfigError(f"{name} holds no dialogues: its name must end in .jsonl or .jsonl.gz")
    found = [
        Dialogue(tuple(_messages(f"line {line} of {name}", text)), line)
        for line, text in enumerate(read_text(Path(name)).split("\n"), 1)
        if text.strip()
    ]
    if not found:
        raise ConfigError(f"{name} is empty; give it a line for each dialogue")
    return found


def _messages(place: str, text: str) -> list[Message]:
    """Return the messages of a line. Raises ConfigError that begins with its `place`."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is no JSON: {error}") from None
    if isinstance(row, dict) and {"prompt", "completion"} <= row.keys():
        given: Any = [
            {"role": role, "content": row[key]}
            for role, key in (("user", "prompt"), ("assistant", "completion"))
        ]
    else:
        given = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f'{place} is no dialogue, as in {{"prompt": "2 + 2?", "completion": "4"}} or '
            '{"messages": [{"role": "user", "content": "2 + 2?"}, ...]}'
        )
    messages = [_message(place, each) for each in given]
    if all(message.role != "assistant" for message in messages):
        raise ConfigError(f"{place} has no message of the assistant, so nothing can be learnt")
    return messages


def _message(place: str, given: Any) -> Message:
    row = given if isinstance(given, dict) else {}
    role, content = row.get("role"), row.get("content")
    if role not in ROLES:
        raise ConfigError(f"{place} has a message of the role {role!r}, not {or_list(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        shown = json.dumps(content)[:60]
        raise ConfigError(f"{place} has a message of the {role} without words, but {shown}")
    return Message(role, content)


def errands() -> list[Dialogue]:
    """Return generated dialogues about animals, the same everywhere.

    The user names two to five animals and asks for the first, the last or their number, once or
    twice in a dialogue. The answer is one word. A model that looks at the question alone, or at
    the animals alone, cannot know it.
    """
    rng, found = np.random.default_rng(0), dict[tuple[Message, ...], None]()
    while len(found) < NUM_GENERATED:
        messages: list[Message] = []
        for _ in range(rng.integers(1, 3)):
            names = [ANIMALS[i] for i in rng.integers(0, len(ANIMALS), rng.integers(2, 6))]
            messages += _errand(("first", "last", "number")[rng.integers(0, 3)], names)
        found[tuple(messages)] = None
    return [Dialogue(messages, line) for line, messages in enumerate(found, 1)]


def _errand(asked: str, names: Sequence[str]) -> list[Message]:
    answers = {"first": names[0], "last": names[-1], "number": str(len(names))}
    question = f"{asked} of {' '.join(names)}"
    return [Message("user", question), Message("assistant", answers[asked])]
