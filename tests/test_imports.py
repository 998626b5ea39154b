"""Order of the files, read from the syntax tree: each imports only from those above it.

Heavy modules are imported only where they are needed.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up: what a line names may be imported by the lines below it. A line is a file or a
# folder; files of one folder line may import each other. A new file needs a line, or a folder that
# has one.
ORDER = """\
minillm/__init__.py
kernels/
minillm/base/
minillm/layout/
minillm/comm/
minillm/autograd/
minillm/ops/
minillm/params/
minillm/parallel/
minillm/nn/
minillm/models/
minillm/tokenizers/
minillm/data/
minillm/metrics/
minillm/tasks/
minillm/replication/
minillm/pipeline/
minillm/checkpoint/
minillm/weights/
minillm/training/
minillm/inference/
minillm/weights/importing.py
minillm/weights/exporting.py
minillm/bench/
minillm/train.py
minillm/finetune.py
minillm/verify.py
minillm/evaluate.py
minillm/generate.py
minillm/schedule.py
minillm/doctor.py
launch/
minillm/__main__.py
""".splitlines()

PACKAGES = {
    "minillm": ROOT / "minillm",
    "minillm.kernels": ROOT / "kernels",
    "minillm.launch": ROOT / "launch",
}
ONLY_WHEN_ASKED = {
    *("cupy", "torch", "tokenizers", "jinja2", "pooch", "matplotlib", "tensorboardX", "wandb")
}
STANDARD_LIBRARY_ONLY = [
    f"minillm/pipeline/{name}.py" for name in ("action", "schedules", "lower", "simulate", "draw")
]
# A program in PyTorch that nothing imports, and its models.
YARDSTICKS = tuple(f"minillm/bench/torch_{name}.py" for name in ("run", "models", "tasks"))
MPI_AT_TOP = {f"minillm/comm/{name}.py" for name in ("mpi", "mpi_spawn", "watchdog")}


def sources() -> list[Path]:
    return sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def line_of(path: str) -> int:
    """Return the position of a file in ORDER, by its own line or its innermost folder's."""
    for name in (path, *(f"{parent.as_posix()}/" for parent in Path(path).parents)):
        if name in ORDER:
            return ORDER.index(name)
    raise AssertionError(f"{path} has no line in ORDER of {Path(__file__).name}")


def file_of(module: str) -> Path | None:
    """Return the file of an import name, None if it is no module of the project."""
    for package, folder in reversed(PACKAGES.items()):
        if module == package or module.startswith(package + "."):
            base = folder.joinpath(*module.removeprefix(package).strip(".").split("."))
            return next(
                (
                    path
                    for path in (base.with_suffix(".py"), base / "__init__.py")
                    if path.is_file()
                ),
                None,
            )
    return None


@functools.cache
def tree_of(text: str) -> ast.Module:
    """Return the syntax tree of a file, which several tests read."""
    return ast.parse(text)


def imports(path: Path, *, module_level: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (imported name, line) of every import statement.

    `from a import b` also gives a.b. Imports for types alone are left out.
    """
    pending: list[ast.AST] = [tree_of(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: a relative import"
            module = node.module or ""
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            yield module, node.lineno
        elif module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


def broken_order(path: Path) -> list[str]:
    """Return the imports of `path` from a line of ORDER below its own."""
    here, broken = line_of(relative(path)), []
    for name, number in imports(path):
        target = file_of(name)
        if target is not None and target != path and line_of(relative(target)) > here:
            broken.append(f"{relative(path)}:{number} imports {name}, which stands below it")
    return broken


def test_files_import_only_from_above() -> None:
    broken = [message for path in sources() for message in broken_order(path)]
    assert not broken, "\n".join(broken)


def cycle(graph: dict[Path, set[Path]]) -> list[str]:
    """Return the files of a circle of imports, empty if there is none."""
    done: set[Path] = set()
    path: list[Path] = []

    def visit(file: Path) -> list[str]:
        if file in path:
            return [relative(f) for f in path[path.index(file) :]]
        if file in done:
            return []
        path.append(file)
        for target in sorted(graph.get(file, ())):
            if found := visit(target):
                return found
        done.add(path.pop())
        return []

    return next((found for file in sorted(graph) if (found := visit(file))), [])


def test_no_files_import_each_other() -> None:
    graph = {
        path: {
            target
            for name, _ in imports(path, module_level=True)
            if (target := file_of(name)) is not None and target.name != "__init__.py"
        }
        - {path}
        for path in sources()
    }
    assert not cycle(graph)
    assert cycle({Path(ROOT / "a"): {Path(ROOT / "b")}, Path(ROOT / "b"): {Path(ROOT / "a")}})


def test_rooms_have_names_of_their_own() -> None:
    """Check for at most 28 programs and folders, and no module named like a program.

    Every folder states its purpose.
    """
    top = ROOT / "minillm"
    programs = {path.stem for path in top.glob("*.py")} - {"__init__"}
    folders = {path.name for path in top.iterdir() if (path / "__init__.py").is_file()}
    assert len(programs | folders) <= 28
    modules = {path.stem for folder in folders for path in (top / folder).rglob("*.py")}
    assert not (modules - {"__init__", "__main__"}) & programs
    for folder in folders:
        purpose = ast.get_docstring(ast.parse((top / folder / "__init__.py").read_text()))
        assert purpose, f"minillm/{folder}/__init__.py does not say what the folder is for"


def test_order_names_only_what_exists() -> None:
    assert len(set(ORDER)) == len(ORDER)
    missing = [name for name in ORDER if not (ROOT / name).exists()]
    assert not missing


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ROOT / "minillm" / "comm" / "mesh.py"
    text = "def late():\n    from minillm import train\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **kwargs: text if self == planted else read(self, **kwargs)
    )
    assert broken_order(planted) == [
        "minillm/comm/mesh.py:2 imports minillm.train, which stands below it"
    ]


def test_kernels_know_nothing_of_minillm() -> None:
    broken = [
        f"{relative(path)}:{number} imports {name}"
        for path in sources()
        if relative(path).startswith("kernels/")
        for name, number in imports(path)
        if name.split(".")[0] == "minillm" and name != "minillm" and name.split(".")[1] != "kernels"
    ]
    assert not broken, "\n".join(broken)


def test_nobody_imports_kernels_or_launch_bare() -> None:
    everything = [*sources(), *(ROOT / "tests").rglob("*.py")]
    broken = [
        f"{relative(path)}:{n} imports {name}"
        for path in everything
        for name, n in imports(path)
        if name.split(".")[0] in ("kernels", "launch")
    ]
    assert not broken, "\n".join(broken)


def test_optional_packages_are_imported_only_when_asked() -> None:
    broken = [
        f"{relative(path)}:{number} imports {name}"
        for path in sources()
        for name, number in imports(path, module_level=True)
        if (name.split(".")[0] in ONLY_WHEN_ASKED and relative(path) not in YARDSTICKS)
        or (name.split(".")[0] == "mpi4py" and relative(path) not in MPI_AT_TOP)
    ]
    assert not broken, "\n".join(broken)


def test_schedules_need_only_the_standard_library() -> None:
    allowed = {"minillm.base", "minillm.pipeline"}
    broken = [
        f"{path}:{number} imports {name}"
        for path in STANDARD_LIBRARY_ONLY
        for name, number in imports(ROOT / path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and ".".join(name.split(".")[:2]) not in allowed
        and name != "minillm"
    ]
    assert not broken, "\n".join(broken)


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after `statement`."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


PROGRAMS = ("train", "evaluate", "generate", "schedule", "doctor")


def test_importing_programs_starts_no_mpi_and_nothing_optional() -> None:
    loaded = loaded_by(f"import minillm, {', '.join(f'minillm.{name}' for name in PROGRAMS)}")
    assert "minillm" in loaded
    assert not loaded & ({"mpi4py", "tyro", "safetensors", "tqdm"} | ONLY_WHEN_ASKED)
