"""Comparison of numeric keys: reasons for a resumed run to differ by rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST_NAMED = 5  # differences listed


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return the differences between two numeric keys in one line; None if they are equal."""
    before, now = dict(_flat(old)), dict(_flat(new))
    changed = [
        f"{name.replace('_', ' ')} {now.get(name, 'unknown')} (was {before.get(name, 'unknown')})"
        for name in dict.fromkeys((*now, *before))
        if name not in now or name not in before or now[name] != before[name]
    ]
    if not changed:
        return None
    more = f", and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
    return ", ".join(changed[:_MOST_NAMED]) + more


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested dictionaries as (dotted name, value)."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(inner) if isinstance(inner, tuple) else inner
