"""Command line and TOML files of the programs, read into records.

tyro splits the words and prints the help. `Record` checks types and bounds, so that flags, files
and Python callers get the same errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from minillm.base.errors import ConfigError
from minillm.base.record import Record, Words, flag, known_name

MOST_TOML = 1_000_000  # bytes of a --config file

RecordT = TypeVar("RecordT", bound=Record)


def parse_flags(
    cls: type[RecordT], argv: Sequence[str], *, prog: str, default: RecordT | None = None
) -> RecordT:
    """Return an instance of `cls` from flags; every program's options pass through here.

    `default` gives the values of flags left out (default: those of the fields). Raises ConfigError
    with one line for an unknown flag, a bad value or a word that belongs to no flag. Raises
    SystemExit(0) after `--help`.
    """
    found, unknown = split_flags(cls, argv, prog=prog, default=default)
    if unknown:
        _refuse(cls, unknown, prog)
    return found


def split_flags(
    cls: type[RecordT],
    argv: Sequence[str],
    *,
    prog: str,
    default: RecordT | None = None,
    add_help: bool = True,
) -> tuple[RecordT, list[str]]:
    """Return an instance of `cls` from its flags, and the words of `argv` that belong to others.

    Raises ConfigError for a bad value and for a required flag that is left out.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(lambda info: _reading(tyro.constructors, info.type))
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with registry, contextlib.redirect_stderr(io.StringIO()):
            found, unknown = tyro.cli(
                cls,
                args=_joined(cls, argv),
                prog=prog,
                description=(cls.__doc__ or "").partition("\n")[0],
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.DisallowNone,
                    tyro.conf.UseAppendAction,
                ),
                return_unknown_args=True,
                add_help=add_help,
                **given,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # Unknown words come back and `Record` checks the values, so nothing else is left to fail.
        required = [
            flag(field.name)
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if field.default is field.default_factory is dataclasses.MISSING
        ]
        raise ConfigError(f"{', '.join(required)} must be given; see {prog} --help") from None
    return found, unknown


def _joined(cls: type[Record], argv: Sequence[str]) -> list[str]:
    """Return `argv` with each text that may begin with a dash joined to its flag by `=`."""
    texts = {flag(name) for name, known in cls.options().items() if known.metadata.get("verbatim")}
    words, joined = iter(argv), []
    for word in words:
        value = next(words, None) if word in texts else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def to_toml(config: Record) -> str:
    """Return `config` as TOML that `--config` reads back to the same values; None is left out."""
    return "".join(
        f"{name} = {_toml_value(value)}\n"
        for name, value in config.to_dict().items()
        if value is not None
    )


def read_toml(path: str) -> dict[str, Any]:
    """Return the table of the TOML file at `path`, dashes in names as underscores.

    Raises ConfigError for a file that cannot be read.
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            content = file.read(MOST_TOML + 1)  # a pipe is welcome, /dev/zero is not
        if len(content) > MOST_TOML:
            raise ValueError(f"it is longer than {MOST_TOML // 1000} kB")
        # As text editors on Windows write it, with a BOM; and names of files may be any bytes.
        values = tomllib.loads(content.decode("utf-8-sig", "surrogateescape"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML, too many digits or brackets
        raise ConfigError(f"--config {path} is not TOML: {error}") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def _refuse(cls: type[Record], words: Sequence[str], prog: str) -> None:
    """Raise ConfigError for the first of `words` that tyro could not place."""
    word, _, value = words[0].partition("=")
    if not word.startswith("-"):
        raise ConfigError(f"{words[0]!r} belongs to no flag; see {prog} --help")
    reason = cls.absent().get(word.lstrip("-").replace("-", "_"))
    if reason is not None:
        shown = " ".join((word, value or "".join(words[1:2]))).rstrip()
        raise ConfigError(f"{shown}: {reason}")
    names = ["--help"]
    for name, known in cls.options().items():
        names += [flag(name), *([flag("no_" + name)] if known.kind is bool else [])]
    known_name(word.replace("_", "-"), names, "flag")
    raise ConfigError(f"{words[0]!r} cannot be read; see {prog} --help")


def _reading(constructors: Any, kind: Any) -> Any:
    """Return tyro's rule for a value: any number of words, so that `Record` finds the errors."""
    if get_origin(kind) is tuple:
        return None  # tyro's own rule: a flag that may be given several times
    inner = kind if get_origin(kind) is Literal else next(iter(get_args(kind)), kind)  # X | None
    choices = get_args(inner)
    words = [word for other in get_args(kind)[1:] for word in get_args(other) if not choices]
    if not choices and inner not in (int, float, str):
        return None  # flags of bool and nested records keep tyro's own rules

    def read(words: list[str]) -> Any:
        if len(words) != 1:
            return Words(words)
        if choices or inner is str:
            return words[0]
        try:
            return inner(words[0])
        except ValueError:
            return words[0]

    return constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{{{','.join(choices)}}}"
        if choices
        else "|".join((inner.__name__.upper(), *words)),
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML basic string but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
