"""The pages name files that exist, and their prose is at most 100 columns wide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("kernels/*/README.md")),
]
WIDTH = 100
TREE = re.compile(r"(?<![\w./-])(?:minillm|kernels|tests|docs|\.ci)/[\w./-]*[\w/]")
SHORT = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|cu|cuh|c|cpp|h|md|svg))`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) outside fenced and indented code blocks and tables."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("    ", "|")):
            yield number, line


def missing_paths(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    # Pages abbreviate: `training/loop.py` lies in minillm/, `native/baseline.c` in kernels/.
    roots = [ROOT, ROOT / "minillm", ROOT / "kernels", ROOT / "tests", ROOT / "docs"]
    paths = {*TREE.findall(text), *SHORT.findall(text)}
    missing = {path for path in paths if not any((root / path).exists() for root in roots)}
    links = {target for target in LINK.findall(text) if "://" not in target}
    return sorted(missing | {link for link in links if not (page.parent / link).exists()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_the_page_exist(page: Path) -> None:
    assert missing_paths(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_at_most_100_columns_wide(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wide = [n for n, line in prose(text) if len(LINK.sub("](", line)) > WIDTH]
    assert wide == []


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`minillm/gone.py`, `minillm/training/`, `training/loop.py`, `training/gone.py`, "
        "https://example.org/docs/elsewhere, [a](page.md), [b](lost.md#part)\n"
        "    python tests/gone/\n",
        encoding="utf-8",
    )
    assert missing_paths(page) == [
        "lost.md",
        "minillm/gone.py",
        "tests/gone/",
        "training/gone.py",
    ]


def test_code_and_tables_may_be_wider() -> None:
    text = "a\n```\nb\n```\n    c\n| d |\ne\n"
    assert [line for _, line in prose(text)] == ["a", "e"]
