"""Kernels: arrays in, arrays out, nothing known of the rest of minillm.

An operation is a folder. Its `reference.py` is the plain definition, for readers and tests, and is
never dispatched. The files of a folder that `IMPLEMENTATIONS` names register what runs: `blocked`
in NumPy, `bindings` in C, `cuda` on a GPU and in the emulator. Folders are found, not listed: a new
operation touches its folder and nothing else. Calling an operation here runs the fastest
implementation available for its arrays, or what `use` forces.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.attention.visibility import Visibility
from minillm.kernels.matmul.packed import Packed, packed
from minillm.kernels.native import prepare_process
from minillm.kernels.pool import get_threads, parallel_for, threads
from minillm.kernels.random.hashing import random_bits, random_uniform
from minillm.kernels.registry import (
    Kernel,
    KernelUnavailable,
    available,
    choices_from,
    chosen,
    dispatch,
    lookup,
    ops,
    resolved,
    use,
)
from minillm.kernels.rope.tables import rope_tables

IMPLEMENTATIONS = ("blocked", "bindings", "cublaslt", "cuda")
"""Files that register implementations. Of a backend, the variant registered first is preferred."""

__all__ = [
    "AttentionDropout",
    "Kernel",
    "KernelUnavailable",
    "Packed",
    "Visibility",
    "available",
    "choices_from",
    "chosen",
    "get_threads",
    "lookup",
    "ops",
    "packed",
    "parallel_for",
    "prepare_process",
    "random_bits",
    "random_uniform",
    "resolved",
    "rope_tables",
    "threads",
    "use",
]


def register_folders(package: str, path: Any) -> list[str]:
    """Import what registers in the operation folders of a package; return the folders' names.

    A folder with a `reference.py` holds operations.
    """
    folders = {
        info.name: {
            file.name for file in pkgutil.iter_modules([f"{at}/{info.name}" for at in path])
        }
        for info in pkgutil.iter_modules(path)
        if info.ispkg
    }
    operations = sorted(name for name, files in folders.items() if "reference" in files)
    for file in IMPLEMENTATIONS:  # backend by backend, because some bindings import others
        for name in operations:
            if file in folders[name]:
                importlib.import_module(f"{package}.{name}.{file}")
    return operations


def public_functions(reference: str) -> dict[str, Callable[..., Any]]:
    """Return by name the public function of every op that a module of plain definitions defines."""
    plain = vars(importlib.import_module(reference))
    return {op: dispatch(plain[op]) for op in ops() if op in plain}


OPERATIONS = register_folders(__name__, __path__)
"""The operation folders, sorted."""

for _folder in OPERATIONS:
    globals().update(public_functions(f"{__name__}.{_folder}.reference"))


def modules(
    file: str, package: str = __name__, folders: Sequence[str] = OPERATIONS
) -> Iterator[ModuleType]:
    """Yield the module `file` of each operation folder that has one."""
    for folder in folders:
        name = f"{package}.{folder}.{file}"
        if importlib.util.find_spec(name):
            yield importlib.import_module(name)


if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Return an operation of one of the folders."""
