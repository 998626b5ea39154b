"""Language of docstrings: first lines that name an action or a thing, not a question."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Paths whose docstrings are not rewritten yet. An entry goes when its last finding does.
NOT_YET = {"kernels/gpu_check"}

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
    folders = (ROOT / "minillm", ROOT / "kernels", ROOT / "launch")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def excused(path: str) -> bool:
    return any(path == entry or path.startswith(f"{entry}/") for entry in NOT_YET)


def found() -> dict[str, list[str]]:
    """Return the findings of every file that has any."""
    everything = {}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        lines = [f"{name}:{n}: {text}" for n, text in findings(path.read_text(encoding="utf-8"))]
        if lines:
            everything[name] = lines
    return everything


def test_docstrings_begin_with_a_verb_or_a_term() -> None:
    broken = [line for name, lines in found().items() if not excused(name) for line in lines]
    assert not broken, "\n".join(broken)


def test_every_exception_is_needed() -> None:
    """Check that the list of exceptions shrinks with its reasons."""
    names = found()
    idle = [e for e in NOT_YET if not any(n == e or n.startswith(f"{e}/") for n in names)]
    assert not idle, f"remove from NOT_YET: {', '.join(sorted(idle))}"


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
