"""Configuration records: frozen dataclasses whose fields carry bounds, help and resumability.

Each subject defines its options beside its code, as a `Record`:

    @dataclass(frozen=True, kw_only=True)
    class ReplicationOptions(Record):
        bucket_mb: float = option(4.0, above=0, resumable=True)
        \"\"\"Size of the gradient buckets in MB.\"\"\"

The sentence under a field is the help of its flag. A record may have records as fields ("rooms").
Outside Python their options form one flat table: a flag or a TOML key names the option alone.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import operator
import os
import textwrap
from collections.abc import Iterable, Mapping
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from minillm.base.errors import ConfigError

RecordT = TypeVar("RecordT", bound="Record")

MOST = 1 << 63  # whole numbers are smaller: they become int64, and floats without overflow
_MOST_TRIED = 100_000  # divisors, 10 ms
_SHOWN = 60  # characters of a bad value that an error shows
_MOST_NAMED = 20  # names that an error lists
_HOLDS = {"at least": operator.ge, "more than": operator.gt, "below": operator.lt}


class Words(tuple[str, ...]):
    """Words of a flag that takes one value and did not get exactly one."""


class _Unquoted(str):
    """Text whose repr has no quotes."""

    __repr__ = str.__str__


class Option(NamedTuple):
    """One option of a record or of one of its rooms."""

    room: str | None  # field of the record that holds it; None if the record does
    kind: Any  # declared type
    metadata: Mapping[str, Any]

    @property
    def resumable(self) -> bool:
        """True if a resumed run may change it."""
        return self.metadata.get("resumable", False) or self.announced

    @property
    def announced(self) -> bool:
        """True if a resumed run may change it and says so: it alters what is computed."""
        return self.metadata.get("announced", False)


def option(
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    resumable: bool = False,
    announced: bool = False,
    path: bool = False,
    verbatim: bool = False,
    switch: tuple[str, str] | None = None,
) -> Any:
    """Return a dataclass field with its bounds.

    NaN and infinity fall outside any bounds. `resumable` marks how a run computes and what it
    reports: a continuation may change it silently. `announced` marks what alters the result: a
    continuation may change it and prints a line. `path` marks a file or folder, where ~ stands for
    the home folder. `verbatim` marks a text that may begin with a dash: the word after the flag is
    its value, whatever it is. `switch` marks a choice that was a bool: its values for False
    and True in older files, and for --no-NAME and --NAME in older command lines.
    """
    given = {"at least": at_least, "more than": above, "below": below}
    bounds = {words: bound for words, bound in given.items() if bound is not None}
    marks: dict[str, Any] = dict(
        resumable=resumable, announced=announced, path=path, verbatim=verbatim
    )
    marks |= {} if switch is None else {"switch": switch}
    return dataclasses.field(default=default, metadata={"bounds": bounds, **marks})


class Record:
    """Base of the configuration dataclasses. Checks types and bounds when an instance is made."""

    ABSENT: ClassVar[Mapping[str, str]] = {}
    """Name of an option that does not exist yet -> the reason, for its error message."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value of a wrong type or out of bounds."""
        for name, known in self.options().items():
            if known.room is None:
                value = _checked(getattr(self, name), known, f"{flag(name)} {{}}")
                object.__setattr__(self, name, value)

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, Option]:
        """Return every option of this record and its rooms by name, in the order of the fields."""
        found: dict[str, Option] = {}
        for name, kind, metadata in _fields(cls):
            inner = {name: Option(None, kind, metadata)}
            if _is_room(kind):
                inner = {key: known._replace(room=name) for key, known in kind.options().items()}
            if twice := found.keys() & inner.keys():
                raise TypeError(f"{cls.__name__} has several options called {', '.join(twice)}")
            found |= inner
        return found

    @classmethod
    def titles(cls) -> list[str]:
        """Return the names of the rooms as users read them, in help texts and TOML tables."""
        return [data.get("title", name) for name, kind, data in _fields(cls) if _is_room(kind)]

    @classmethod
    def absent(cls) -> dict[str, str]:
        """Return the options that this record and its rooms refuse by name, with the reasons."""
        rooms = [kind for _, kind, _ in _fields(cls) if _is_room(kind)]
        return {name: reason for each in (cls, *rooms) for name, reason in each.ABSENT.items()}

    @classmethod
    @functools.cache
    def sentences(cls) -> dict[str, str]:
        """Return the help of each field: the text below it in the source, on one line.

        A class without source, such as one made at run time, has those of its bases alone.
        """
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            with contextlib.suppress(OSError, TypeError):  # no source
                body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
                for field, below in itertools.pairwise(body):
                    if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                        found[ast.unparse(field.target)] = " ".join(
                            ast.literal_eval(below.value).split()
                        )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the flat table: option name -> value, in the order of the fields."""
        return {
            name: getattr(self if known.room is None else getattr(self, known.room), name)
            for name, known in self.options().items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Return the record that holds the flat table `values`, the rest at their defaults.

        Raises ConfigError for unknown names and bad values; it names `source`, their origin.
        """
        own, rooms = _by_room(cls, values, source)
        return cls(**own, **{room: getattr(cls, room).replace(**rooms[room]) for room in rooms})

    def replace(self, **values: Any) -> Self:
        """Return a copy with some options of the flat table changed."""
        own, rooms = _by_room(type(self), values, "the configuration")
        changed = {room: getattr(self, room).replace(**rooms[room]) for room in rooms}
        copy: Any = self
        return dataclasses.replace(copy, **own, **changed)


def with_defaults(cls: type[RecordT], **defaults: Any) -> type[RecordT]:
    """Return a subclass of `cls` with other defaults of fields, or with further rooms.

    A record takes the place of a room of any type.
    """
    old, kind = {field.name: field.metadata for field in dataclasses.fields(cls)}, kinds(cls)  # type: ignore[arg-type]
    fields = [
        (
            name,
            type(value) if isinstance(value, Record) else kind[name],
            dataclasses.field(default=value, metadata=old.get(name)),
        )
        for name, value in defaults.items()
    ]
    return dataclasses.make_dataclass(
        cls.__name__,
        fields,
        bases=(cls,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": cls.__doc__},
    )


def kinds(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a record; that of a room is the type of its default."""
    hints = get_type_hints(cls)
    return {
        field.name: type(field.default) if isinstance(field.default, Record) else hints[field.name]
        for field in dataclasses.fields(cls)
    }


def _fields(cls: Any) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """Return name, type and metadata of each field of a dataclass."""
    found = kinds(cls)
    return [(field.name, found[field.name], field.metadata) for field in dataclasses.fields(cls)]


def _is_room(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Record)


def _by_room(
    cls: type[Record], values: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the options of a flat table that `cls` itself holds, and those of each room.

    Raises ConfigError for unknown names and wrong types.
    """
    known = cls.options()
    own: dict[str, Any] = {}
    rooms: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known and name in (absent := cls.absent()):
            raise ConfigError(f"{name} = {value!r} in {source}: {absent[name]}")
        found = known[known_name(name, known, f"option in {source}")]
        target = own if found.room is None else rooms.setdefault(found.room, {})
        target[name] = _checked(value, found, f"{name} = {{!r}} in {source}", bounds=False)
    return own, rooms


def _checked(value: Any, known: Option, text: str, *, bounds: bool = True) -> Any:
    """Return `value`, an int as a float where one is wanted.

    Raises ConfigError that begins with `text`, formatted with the value.
    """
    if get_origin(known.kind) is tuple:
        one = known._replace(kind=get_args(known.kind)[0])
        return tuple(_checked(item, one, text, bounds=bounds) for item in value)
    if isinstance(value, bool) and "switch" in known.metadata:
        value = known.metadata["switch"][value]
    if isinstance(value, Words):
        raise ConfigError(f"{text.format('takes one value')}, not {' '.join(value) or 'none'}")
    if type(value) is int and abs(value) >= MOST:
        raise ConfigError(f"{text.format(_short(value))} must be less than 2^63")
    if type(value) is int and float in (known.kind, *get_args(known.kind)):
        value = float(value)
    if wanted := _wanted_type(value, known.kind):
        raise ConfigError(f"{text.format(_short(value))} must be {wanted}")
    if isinstance(value, str) and bounds:
        return _checked_text(value, known, text)
    limits = known.metadata.get("bounds") if bounds and value is not None else None
    if limits and not (
        math.isfinite(value) and all(_HOLDS[words](value, limits[words]) for words in limits)
    ):
        wanted = " and ".join(f"{words} {bound}" for words, bound in limits.items())
        raise ConfigError(f"{text.format(value)} must be {wanted}")
    return value


def _checked_text(value: str, known: Option, text: str) -> str:
    """Return `value`, ~ in a path as the home folder. Raises ConfigError if it is empty."""
    if not value:
        raise ConfigError(f"{text.format(repr(value))} is empty; give a value, or leave it out")
    if not (known.metadata.get("path") and value.startswith("~")):
        return value
    found = os.path.expanduser(value)
    if found.startswith("~"):
        raise ConfigError(
            f"{text.format(value)} names the home of an unknown user; a file that begins with ~ "
            f"is ./{value}"
        )
    return found


def _short(value: Any) -> Any:
    """Return `value`, or the beginning of it as text if an error could not show it whole."""
    if type(value) is int and value.bit_length() > 64:  # Python refuses to print 4300 digits
        return _Unquoted(f"(a number of {value.bit_length()} bits)")
    text = str(value)
    return value if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _wanted_type(value: Any, kind: Any) -> str:
    """Return the description of `kind` unless `value` is of it, else an empty string."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return "" if value in inner else "one of " * (len(inner) > 1) + ", ".join(inner)
    if inner:  # X | None, X | Y | None
        kinds = [each for each in inner if each is not type(None)]
        if len(kinds) < len(inner) and value is None:
            return ""
        wanted = [_wanted_type(value, each) for each in kinds]
        # The second of two types without "of type": of type int or str.
        others = "".join(f" or {words.removeprefix('of type ')}" for words in wanted[1:])
        return "" if "" in wanted else wanted[0] + others
    return "" if type(value) is kind else f"of type {kind.__name__}"


def flag(name: str) -> str:
    """Return the flag of an option: kv_heads -> --kv-heads."""
    return "--" + name.replace("_", "-")


def known_name(name: str, known: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `known`.

    Raises ConfigError with the nearest names, or with all if none is near and they are few.
    """
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"choose one of {', '.join(known)}"
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif len(known) > _MOST_NAMED:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0)
        hint = f"the nearest are {or_list(nearest)}; minillm train --help lists all"
    raise ConfigError(f"unknown {what}: {_short(name)!r}; {hint}")


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending: 12 -> 1, 2, 3, 4, 6, 12.

    Beyond 10^10 those are missing whose two factors both exceed 10^5.
    """
    last = min(math.isqrt(number), _MOST_TRIED)
    small = [d for d in range(1, last + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def some_divisors(number: int, near: int, most: int = 6) -> str:
    """Return the divisors of `number` nearest to `near`, as text for an error: '2, 4 or 8'."""
    chosen = sorted(sorted(divisors(number), key=lambda d: abs(d - near))[:most])
    return or_list(chosen)


def or_list(items: Iterable[Any]) -> str:
    """Return 'a, b or c'."""
    words = [str(item) for item in items]
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
