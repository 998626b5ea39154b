"""Registry of objectives: one file of this folder with an `OBJECTIVE`, found, not listed."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from minillm import tasks
from minillm.base.record import known_name
from minillm.tasks.protocol import Objective

_registered: dict[str, Objective] = {}


def register(objective: Objective) -> None:
    """Make an objective known that has no file in this folder."""
    _registered[objective.name] = objective


def objective(name: str) -> Objective:
    """Return the objective `name`. Raises ConfigError for an unknown one."""
    known = _found() | _registered
    return known[known_name(name, known, "objective")]


@functools.cache
def _found() -> dict[str, Objective]:
    names = [module.name for module in pkgutil.iter_modules(tasks.__path__)]
    modules = (importlib.import_module(f"{tasks.__name__}.{name}") for name in names)
    return {
        module.OBJECTIVE.name: module.OBJECTIVE
        for module in modules
        if hasattr(module, "OBJECTIVE")
    }
