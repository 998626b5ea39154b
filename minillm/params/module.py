"""Modules: named trees of layers and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minillm.params.parameter import Parameter
from minillm.params.where import Where


class Module:
    """A part of a model. Attributes that are modules, parameters, or lists and dicts of modules are
    found by name, in order of assignment."""

    name = ""

    def forward(self, x: Any, where: Where) -> Any:
        """Compute the result for the local arrays `x` that sit at `where`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def __call__(self, x: Any, where: Where) -> Any:
        return self.forward(x, where)

    def children(self) -> Iterator[tuple[str, Module | Parameter]]:
        """Direct children as (name, child)."""
        for name, value in vars(self).items():
            if isinstance(value, (Module, Parameter)):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from (
                    (f"{name}.{i}", child)
                    for i, child in enumerate(value)
                    if isinstance(child, (Module, Parameter))
                )
            elif isinstance(value, dict):
                yield from (
                    (f"{name}.{key}", child)
                    for key, child in value.items()
                    if isinstance(child, (Module, Parameter))
                )

    def assign_names(self, prefix: str = "") -> None:
        """Give every module and parameter its global dotted name. A parameter that stands in two
        places keeps the first."""
        self.name = prefix
        for name, child in self.children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Module):
                child.assign_names(path)
            elif not child.name:
                child.name = path

    def parameters(self) -> list[Parameter]:
        """Every parameter once, in order of the module tree."""
        found: dict[int, Parameter] = {}
        for _, child in self.children():
            for parameter in child.parameters() if isinstance(child, Module) else [child]:
                found.setdefault(id(parameter), parameter)
        return list(found.values())
