"""Questions of SQuAD: both versions, errors with file and question, and the generated facts."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minillm.base.errors import ConfigError
from minillm.data.facts import ADJECTIVES, DAYS, FIRST, PLACES, SECOND, THINGS, VERBS, facts
from minillm.data.labelled import split
from minillm.data.squad import Answer, Question, read_questions, read_unanswered

CONTEXT = "The r\u00e9d house \U0001f3e0 stands in Berlin."


def entry(id_: str = "q1", **more: Any) -> dict[str, Any]:
    answers = [{"text": "Berlin", "answer_start": CONTEXT.index("Berlin")}]
    return {"id": id_, "question": "Where?", "answers": answers} | more


def squad(*qas: dict[str, Any], context: Any = CONTEXT) -> dict[str, Any]:
    return {"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}


def written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def test_both_versions_and_compressed_files(tmp_path: Path) -> None:
    place = CONTEXT.index("Berlin")
    none = {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True}
    none["plausible_answers"] = [{"text": "house", "answer_start": 0}]
    two = [{"text": "in Berlin", "answer_start": place - 3}, *entry()["answers"]]
    value = squad(entry(), none, entry("q3", answers=two, is_impossible=False))
    expected = [
        Question("q1", "Where?", CONTEXT, (Answer("Berlin", place),)),
        Question("q2", "Who?", CONTEXT),
        Question(
            "q3", "Where?", CONTEXT, (Answer("in Berlin", place - 3), Answer("Berlin", place))
        ),
    ]
    assert read_questions(written(tmp_path / "a.json", value)) == expected
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(value).encode()))
    assert read_questions(str(path)) == expected
    found = read_unanswered(str(path))
    assert found == [each._replace(answers=()) for each in expected]


def test_questions_without_answers_and_lines_of_json(tmp_path: Path) -> None:
    bare = {"id": "q1", "question": "Where?"}
    name = written(tmp_path / "a.json", squad(bare))
    assert read_unanswered(name) == [Question("q1", "Where?", CONTEXT)]
    with pytest.raises(
        ConfigError, match=r"question 'q1' in line 1 of .*a.json has no list 'answers'"
    ):
        read_questions(name)
    lines = [{"question": "Where?", "context": "Here."}, {"question": "a", "context": "b", "id": 7}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_unanswered(str(path)) == [
        Question("1", "Where?", "Here."),
        Question("7", "a", "b"),
    ]
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ConfigError, match=r"line 1 of .*a.jsonl has no text 'context'"):
        read_unanswered(str(path))


def test_an_error_names_the_line_of_its_question(tmp_path: Path) -> None:
    wrong = entry(id="q7", answers=[{"text": "Rome", "answer_start": 4}])
    path = tmp_path / "long.json"
    path.write_text(json.dumps(squad(*(entry(id=f"q{n}") for n in range(7)), wrong), indent=1))
    (line,) = (n for n, row in enumerate(path.read_text().split("\n"), 1) if '"q7"' in row)
    assert line > 50
    with pytest.raises(ConfigError, match=f"question 'q7' in line {line} of .*long.json has the"):
        read_questions(str(path))


PLACE = CONTEXT.index("Berlin")
AT_BYTES = [{"text": "Berlin", "answer_start": len(CONTEXT[:PLACE].encode())}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (squad(), ["has no question"]),
        ({"data": {}}, ["has no list 'data'"]),
        ([], ["has no list 'data'"]),
        (squad(entry(), context=7), ["paragraph 1 of article 1 of", "no text 'context'"]),
        (squad({"question": "?"}), ["question 1 of paragraph 1 of article 1", "no text 'id'"]),
        (squad({"id": "x"}), ["question 'x' in line 1 of", "no text 'question'"]),
        (squad(entry(), entry()), ["two questions of the id 'q1'"]),
        (squad(entry(answers=[])), ["'q1'", "0 answers and is_impossible false"]),
        (squad(entry(is_impossible=True)), ["'q1'", "1 answers and is_impossible true"]),
        (squad(entry(answers=[{"text": "Berlin"}])), ["'q1'", "no whole number 'answer_start'"]),
        (squad(entry(answers=[{"text": " ", "answer_start": 3}])), ["'q1'", "an empty answer"]),
        (squad(entry(answers=[{"text": "Rome", "answer_start": 4}])), ["'q1'", "'Rome' at 4"]),
        (squad(entry(answers=[{"text": "Berlin", "answer_start": 99}])), ["outside its context"]),
        (squad(entry(answers=[{"text": "Berlin", "answer_start": -1}])), ["outside its context"]),
        (squad(entry(answers=AT_BYTES)), ["'q1'", "outside its context"]),
    ],
)
def test_bad_files_are_refused(value: Any, words: list[str], tmp_path: Path) -> None:
    name = written(tmp_path / "bad.json", value)
    with pytest.raises(ConfigError) as error:
        read_questions(name)
    assert all(word in str(error.value) for word in ["bad.json", *words]), str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"data":\n [}', ["line 2 of", "is not JSON"]),
        (b'{"data":\n"\xff"}', ["line 2 of", "is not UTF-8"]),
        (b"", ["line 1 of", "is not JSON"]),
        (b"[" * 100_000, ["bad.json"]),
        (b'{"data": 1' + b"0" * 5000 + b"}", ["bad.json", "no JSON that can be read"]),
    ],
)
def test_files_that_are_no_json(content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_questions(str(tmp_path / "bad.json"))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_questions_about_a_context_stay_together() -> None:
    train, held_out = split(facts())
    assert not {each.context for each in train} & {each.context for each in held_out}
    assert len(held_out) == 600 and len(train) == 5400


def test_the_rule_of_the_generated_facts() -> None:
    """Find the answers without the places that the generator knows."""
    people, days, verb = "|".join(FIRST), "|".join(DAYS), "|".join(VERBS)
    adjectives = f"(?:(?:{'|'.join(ADJECTIVES)}) )*"
    patterns = {
        "Who": rf"by ((?:{people})(?: (?:{'|'.join(SECOND)}))?)",
        "What": rf"((?:a|the) {adjectives}(?:{'|'.join(THINGS)})) was (?:{verb})",
        "Where": rf"in ((?:a|the) {adjectives}(?:{'|'.join(PLACES)}))",
        "When": rf"on ({days})",
    }
    asked = Counter[str]()
    for each in facts():
        kind = each.question.partition(" ")[0]
        (found,), (answer,) = re.findall(patterns[kind], each.context), each.answers
        assert (found, each.context[answer.start :][: len(found)]) == (answer.text, answer.text)
        asked[kind] += 1
    assert asked.keys() == patterns.keys() and min(asked.values()) > len(facts()) / 5
