"""Modules: named trees of layers and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from minillm.params.parameter import Parameter

M = TypeVar("M", bound="Module")


class Module:
    """Part of a model.

    Attributes that are modules, parameters, or lists and dicts of those are found by name, in order
    of assignment. A module holds no state of a pass: `forward(x, pass_)` receives it.
    """

    name = ""
    forward: Callable[..., Any]
    __call__: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        """Make a call the forward pass itself: a layer costs no second Python frame."""
        if "forward" in vars(cls):
            cls.__call__ = cls.forward  # type: ignore[method-assign]

    def children(self) -> Iterator[tuple[str, Module | Parameter]]:
        """Yield direct children as (name, child)."""
        for name, value in vars(self).items():
            if isinstance(value, (Module, Parameter)):
                yield name, value
            elif isinstance(value, (list, tuple, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from (
                    (f"{name}.{key}", child)
                    for key, child in items
                    if isinstance(child, (Module, Parameter))
                )

    def modules(self, kind: type[M]) -> Iterator[M]:
        """Yield every module of type `kind` in this tree, in order, this one included."""
        if isinstance(self, kind):
            yield self
        for _, child in self.children():
            if isinstance(child, Module):
                yield from child.modules(kind)

    def assign_names(self, prefix: str = "") -> None:
        """Give every module and parameter its global dotted name.

        A parameter that appears in two places keeps the first name.
        """
        self.name = prefix
        for name, child in self.children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Module):
                child.assign_names(path)
            elif not child.name:
                child.name = path

    def parameters(self) -> list[Parameter]:
        """Return every parameter once, in order of the module tree."""
        found: dict[int, Parameter] = {}
        for _, child in self.children():
            for parameter in child.parameters() if isinstance(child, Module) else [child]:
                found.setdefault(id(parameter), parameter)
        return list(found.values())
