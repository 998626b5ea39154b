"""Questions about contexts: JSON of SQuAD 1.1 and 2.0, plain or .gz, and lines of JSON to answer.

An answer is a span of its context. Every error names the file, and where there is one the question
with its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.data.tables import ending, read_text


class Answer(NamedTuple):
    """Right answer to a question."""

    text: str
    start: int  # characters of the context before it


class Question(NamedTuple):
    """Question about a context."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()  # the first one is learnt; none: the context has no answer

    @property
    def texts(self) -> tuple[str, ...]:
        """The context alone, so that all questions about it are learnt or held out together."""
        return (self.context,)


def questions_of(value: Any) -> list[Question]:
    """Return the questions that came as JSON from another rank."""
    return [
        Question(id_, question, context, tuple(Answer(*each) for each in answers))
        for id_, question, context, answers in value
    ]


def read_questions(name: str) -> list[Question]:
    """Return the questions of a file of SQuAD, with their answers.

    Raises ConfigError for a file that cannot be read, is no JSON or has no question, for a field
    that is missing, for an id that repeats, for a question without an answer that is not marked as
    impossible, and for an answer that is not at its place in the context.
    """
    return _checked(name, (_answered(*each) for each in _entries(name)))


def read_unanswered(name: str) -> list[Question]:
    """Return the questions of a file of SQuAD or of .jsonl, which needs no answers.

    A line of .jsonl has "question" and "context", and may have an "id". Raises ConfigError as
    `read_questions` does.
    """
    if ending(name) != ".jsonl":
        return _checked(name, (Question(*each[1:4]) for each in _entries(name)))
    return _checked(name, _lines(name))


def _lines(name: str) -> Iterator[Question]:
    """Yield the questions of lines of JSON. One without an id has the number of its line."""
    for line, content in enumerate(read_text(Path(name)).split("\n"), 1):
        if not content.strip():
            continue
        at = f"line {line} of {name}"
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{at} is no JSON: {error}") from None
        texts = [_field(value, field, str, at) for field in ("question", "context")]
        yield Question(str(value.get("id", line)), *texts)


def _checked(name: str, questions: Iterator[Question]) -> list[Question]:
    """Return the questions. Raises ConfigError if there is none, or if an id repeats."""
    found, seen = list(questions), set[str]()
    for each in found:
        if each.id in seen:
            raise ConfigError(f"{name} has two questions of the id {each.id!r}; ids must differ")
        seen.add(each.id)
    if not found:
        raise ConfigError(f"{name} has no question; give it one, in the format of SQuAD")
    return found


class _Places:
    """Line numbers in a text of words that are asked for in their order."""

    def __init__(self, text: str) -> None:
        self._text, self._start, self._line = text, 0, 1

    def line_of(self, word: str) -> int:
        """Return the line of the next `word`; of the last one found where there is none."""
        found = self._text.find(word, self._start)
        if found >= 0:
            self._line += self._text.count("\n", self._start, found)
            self._start = found
        return self._line


def _entries(name: str) -> Iterator[tuple[str, str, str, str, dict[str, Any]]]:
    """Yield place, id, question, context and JSON object of each question of a file of SQuAD."""
    path = Path(name)
    try:
        text = read_text(path)
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"line {error.lineno} of {path} is not JSON: {error.msg}; questions come in the format "
            'of SQuAD, {"data": [{"paragraphs": [...]}]}'
        ) from None
    except (ValueError, RecursionError) as error:  # too many digits or brackets
        raise ConfigError(f"{path} is no JSON that can be read: {error}") from None
    places = _Places(text)
    for a, article in enumerate(_field(value, "data", list, f"{path}"), 1):
        at_article = f"article {a} of {path}"
        for p, paragraph in enumerate(_field(article, "paragraphs", list, at_article), 1):
            at = f"paragraph {p} of {at_article}"
            context = _field(paragraph, "context", str, at)
            for q, entry in enumerate(_field(paragraph, "qas", list, at), 1):
                id_ = _field(entry, "id", str, f"question {q} of {at}")
                line = places.line_of(json.dumps(id_, ensure_ascii=False))
                where = f"question {id_!r} in line {line} of {path}"
                yield where, id_, _field(entry, "question", str, where), context, entry


_KINDS = {list: "list", str: "text", int: "whole number"}


def _field(value: Any, name: str, kind: type, at: str) -> Any:
    """Return a field of a JSON object. Raises ConfigError that names its place, `at`."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ConfigError(
            f"{at} has no {_KINDS[kind]} {name!r}; see docs/tasks.md for the format of SQuAD"
        )
    return found


def _answered(at: str, id_: str, question: str, context: str, entry: dict[str, Any]) -> Question:
    """Return a question with its answers. Raises ConfigError for answers that are wrong."""
    impossible = entry.get("is_impossible", False)
    answers = entry.get("answers", [] if impossible else None)
    if not isinstance(answers, list):
        raise ConfigError(f"{at} has no list 'answers'")
    if not isinstance(impossible, bool) or impossible == bool(answers):
        raise ConfigError(
            f"{at} has {len(answers)} answers and is_impossible {json.dumps(impossible)}; a "
            "question has an answer, or is_impossible true"
        )
    found = []
    for each in answers:
        text, start = (
            _field(each, "text", str, f"an answer to {at}"),
            _field(each, "answer_start", int, f"an answer to {at}"),
        )
        if not text.strip():
            raise ConfigError(f"{at} has an empty answer; mark it with is_impossible true instead")
        if not 0 <= start <= len(context) - len(text):
            raise ConfigError(
                f"{at} has an answer of {len(text)} characters at {start}, outside its context of "
                f"{len(context)}"
            )
        if (there := context[start : start + len(text)]) != text:
            raise ConfigError(
                f"{at} has the answer {_short(text)} at {start}, where its context has "
                f"{_short(there)}; answer_start counts characters, not bytes"
            )
        found.append(Answer(text, start))
    return Question(id_, question, context, tuple(found))


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


def answerless(questions: Sequence[Question]) -> int:
    """Return the number of questions that their contexts do not answer."""
    return sum(not each.answers for each in questions)
