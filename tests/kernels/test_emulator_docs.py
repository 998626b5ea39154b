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


def without_numbers(line: str) -> str:
    """Replace numbers, so that the text and minus infinities are left.

    Line numbers move, and another compiler may round differently.
    """
    return re.sub(r"[\d.e+-]*\d[\d.]*", "#", re.sub(r"\s+", " ", line.strip()))


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
