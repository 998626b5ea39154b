"""Style of the C and CUDA sources: line width, file length and words of comments."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SUFFIXES = {".c", ".h", ".cpp", ".cu", ".cuh"}
COLUMNS, LINES = 100, 400
COMMENT = re.compile(r"^\s*//\s?(.*)$")
QUESTION = re.compile(r"(What|How|Where|Whether|Which|Who|Whose|When|Why|See|Whatever)\b")
WORD = re.compile(r"\b(nobody|somebody|anyhow|for ever|anew)\b", re.IGNORECASE)


def sources() -> list[Path]:
    return sorted(path for path in KERNELS.rglob("*") if path.suffix in SUFFIXES)


def findings(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, fault) of a source; a question counts in the first line of a comment."""
    lines = text.splitlines()
    if len(lines) > LINES:
        yield len(lines), f"more than {LINES} lines"
    within = False
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns"
        comment = COMMENT.match(line)
        if comment and not within and QUESTION.match(comment[1]):
            yield number, f"comment begins with {comment[1].split()[0]}"
        if found := WORD.search(line.partition("//")[2]):
            yield number, f"word {found[0]}"
        within = bool(comment and comment[1])


def test_sources_keep_the_style() -> None:
    assert len(sources()) > 50
    broken = [
        f"{path.relative_to(KERNELS).as_posix()}:{line}: {fault}"
        for path in sources()
        for line, fault in findings(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("int x;  // " + "a" * 90, ["101 columns"]),
        ("int x;\n" * 401, ["more than 400 lines"]),
        ("// What a thread does.", ["comment begins with What"]),
        ("// Sum of a row,\n// What it is.\n//\n// Whether", ["comment begins with Whether"]),
        ("int x;  // that nobody reads", ["word nobody"]),
        ("const char* nobody;  // " + "a" * 76, []),
    ],
)
def test_a_fault_is_seen(source: str, faults: list[str]) -> None:
    assert [fault for _, fault in findings(source)] == faults
