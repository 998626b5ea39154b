"""Operations are found from their folders: a new one touches no list."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from minillm.kernels import registry
from minillm.kernels.emulator import examples

from minillm import kernels

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path(kernels.__file__).parent

TOY = {
    "__init__.py": "",
    "reference.py": "def toy_double(x):\n    return 2 * x\n",
    "blocked.py": (
        "from minillm.kernels.registry import kernel\n\n"
        "@kernel('toy_double')\ndef toy_double(x):\n    return x + x\n"
    ),
    "examples.py": "def toy_double(make):\n    return make\n",
    "cases.py": "def cases():\n    yield 'a case of toy_double'\n",
    "rates.py": "def calls(sizes):\n    yield f'toy_double of {sizes}'\n",
}


def test_a_new_folder_registers_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy_kernels"
    (package / "toy").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, text in TOY.items():
        (package / "toy" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert kernels.register_folders("toy_kernels", [str(package)]) == ["toy"]
        assert "toy_double" in kernels.ops()
        double = kernels.public_functions("toy_kernels.toy.reference")["toy_double"]
        assert double(np.arange(3)).tolist() == [0, 2, 4]
        assert list(examples.found_in("toy_kernels", ["toy"])) == ["toy_double"]
        for file, names in (("cases", ["cases"]), ("rates", ["calls"]), ("reader", [])):
            found = list(kernels.modules(file, "toy_kernels", ["toy"]))
            assert [name for module in found for name in names if hasattr(module, name)] == names
    finally:
        registry._kernels.pop("toy_double", None)
        registry.forget()
        for name in [name for name in sys.modules if name.startswith("toy_kernels")]:
            del sys.modules[name]


@pytest.mark.parametrize("folder", kernels.OPERATIONS)
def test_the_reference_defines_every_operation_of_its_folder(folder: str) -> None:
    plain = import_module(f"minillm.kernels.{folder}.reference")
    source = inspect.getsource(plain)
    assert "@kernel(" not in source, "the plain definition is never dispatched"
    own = [op for op in kernels.ops() if kernels.available(op)[0].family == folder]
    assert [op for op in own if op not in vars(plain)] == []
    for op in own:
        public = getattr(kernels, op)
        assert public is not vars(plain)[op]
        assert (public.__doc__, inspect.signature(public)) == (
            vars(plain)[op].__doc__,
            inspect.signature(vars(plain)[op]),
        )


def test_every_c_file_is_compiled() -> None:
    sources = [*FOLDER.glob("native/*.h"), *FOLDER.glob("native/*.c")]
    included = "".join(path.read_text() for path in sources)
    lacking = [
        path.relative_to(FOLDER).as_posix()
        for path in sorted(FOLDER.glob("*/cpu.c"))
        if f"../{path.relative_to(FOLDER).as_posix()}" not in included
    ]
    assert not lacking, f"kernels/native does not include {lacking}"


def test_every_package_is_installed() -> None:
    listed = set(re.findall(r'"(minillm[\w.]*)"', (ROOT / "pyproject.toml").read_text()))
    for name, folder in (("minillm", ROOT / "minillm"), ("minillm.kernels", FOLDER)):
        for init in sorted(folder.rglob("__init__.py")):
            parts = init.parent.relative_to(folder).parts
            assert ".".join((name, *parts)) in listed, f"{init.parent} is not in pyproject.toml"
