"""Language of docstrings: first lines that name an action or a thing, not a question."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

QUESTIONS = {"What", "How", "Where", "Whether", "Which", "Who", "When", "Why", "See"}
ARTICLES = {"The", "A", "An"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of docstrings that begin with a question or, in a function, a noun."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for child in body if isinstance(body, list) else ():
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                text = child.value.value
                if isinstance(text, str) and first_word(text) in forbidden(node, child):
                    yield child.lineno, text.strip().splitlines()[0]


def first_word(text: str) -> str:
    """Return the first word of a text, without punctuation."""
    return text.split()[0].rstrip(":,.") if text.split() else ""


def forbidden(node: ast.AST, child: ast.Expr) -> set[str]:
    """Return the first words that the docstring `child` of `node` may not have.

    A property has a value, so an article may begin its docstring. So may it that of an attribute.
    """
    function = isinstance(node, ast.FunctionDef) and child is node.body[0]
    if not function or any("property" in ast.unparse(d) for d in node.decorator_list):
        return QUESTIONS
    return QUESTIONS | ARTICLES


def sources() -> list[Path]:
    folders = (ROOT / "minillm", ROOT / "kernels", ROOT / "launch", ROOT / "tests")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_docstrings_begin_with_a_verb_or_a_term() -> None:
    broken = [
        f"{path.relative_to(ROOT).as_posix()}:{line}: {text}"
        for path in sources()
        for line, text in findings(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ('def f():\n    """Whether it is so."""', 1),
        ('def f():\n    """The sum."""', 1),
        ('class C:\n    """What it holds."""\n    x: int\n    """Where it lies."""', 2),
        ('"""How it works."""', 1),
        ('def f():\n    """Return the sum."""', 0),
        ('class C:\n    @property\n    def f(self):\n        """The sum."""', 0),
        ('class C:\n    """A sum."""', 0),
    ],
)
def test_questions_and_nouns_are_found(source: str, number: int) -> None:
    assert len(list(findings(source))) == number
