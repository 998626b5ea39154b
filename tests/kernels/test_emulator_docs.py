"""docs/emulator.md shows what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from minillm.kernels import emulator
from minillm.kernels.emulator.__main__ import main

pytestmark = pytest.mark.skipif(
    emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "emulator.md"
COMMAND = re.compile(
    r"^    python -m minillm\.kernels\.emulator ([^\n]*)\n\n```\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Shown(NamedTuple):
    """Command and the lines of its output that the page shows."""

    words: str
    lines: list[str]


SHOWN = [
    Shown(words, output.splitlines())
    for words, output in COMMAND.findall(PAGE.read_text(encoding="utf-8"))
]


SOURCE_LINE = re.compile(r"(\w+\.cuh?:\d+)")


def without_numbers(line: str) -> str:
    """Replace numbers, so that the text, minus infinities and lines of sources are left.

    Another compiler may round differently. A reader looks the lines up.
    """
    parts = SOURCE_LINE.split(re.sub(r"\s+", " ", line.strip()))
    parts[::2] = [re.sub(r"[\d.e+-]*\d[\d.]*", "#", part) for part in parts[::2]]
    return "".join(parts)


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.words[:60])
def test_the_page_shows_what_the_command_prints(
    shown: Shown,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main(shlex.split(shown.words))
    printed = [without_numbers(line) for line in "".join(capsys.readouterr()).splitlines()]
    at = 0
    for line in filter(lambda line: line != "...", shown.lines):
        wanted = without_numbers(line)
        assert wanted in printed[at:], f"not printed (any more): {line}"
        at = printed.index(wanted, at) + 1


def test_the_page_has_its_commands() -> None:
    assert len(SHOWN) == 8


def test_a_stale_line_number_is_seen() -> None:
    assert without_numbers("S = 1.5 at v1.cu:190 twice") == "S = # at v1.cu:190 twice"
    assert without_numbers("S = 1.7 at v1.cu:191 twice") != without_numbers("v1.cu:190")


def test_an_unknown_operation_gets_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nosuch", "v1"]) == 1
    message = capsys.readouterr().err
    assert all(name in message for name in ("attention", "layernorm", "softmax_xent", "nosuch v1"))
