"""Command line and TOML files of the programs, read into records.

tyro splits the words and prints the help. `Record` checks types and bounds, so that flags, files
and Python callers get the same errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from minillm.base.errors import ConfigError
from minillm.base.record import Record, RecordT, Words, flag, kinds, known_name

Run = TypeVar("Run")  # function that runs a program

MOST_TOML = 1_000_000  # bytes of a --config file


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


def parse_program(
    programs: Mapping[str, tuple[type[RecordT], Run]], argv: Sequence[str], *, prog: str, word: str
) -> tuple[Run, RecordT]:
    """Return the function of the program that the first word of `argv` names, and its options.

    `word` says what the programs are: benchmark. Without a word, or with `--help`, prints the list
    and raises SystemExit(0). Raises ConfigError as `parse_flags` does, and for an unknown name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, programs)) + 2
        print(f"usage: {prog} {word.upper()} [OPTIONS]\n")
        for name, (options, _) in programs.items():
            print(f"  {name:{width}}{(options.__doc__ or '').splitlines()[0]}")
        print(f"\n{prog} {word.upper()} --help lists the options of one.")
        raise SystemExit(0)
    options, run = programs[known_name(argv[0], programs, word)]
    return run, parse_flags(options, argv[1:], prog=f"{prog} {argv[0]}")


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

    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with _rules(tyro), contextlib.redirect_stderr(io.StringIO()):
            found, unknown = tyro.cli(
                cls,
                args=_joined(cls, argv),
                prog=prog,
                description=inspect.cleandoc(cls.__doc__ or ""),
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


def completion_script(programs: Mapping[str, type[Record]], shell: str, prog: str) -> str:
    """Return a script that completes the flags of each of `programs`, and their values.

    `shell` is bash, zsh or fish. The script runs a Python without packages for each completion.
    """
    import tyro

    kinds: Any = [
        Annotated[
            dataclasses.make_dataclass(
                name, [], bases=(cls,), namespace={"__doc__": cls.__doc__}, frozen=True
            ),
            tyro.conf.subcommand(name, prefix_name=False),
        ]
        for name, cls in programs.items()
    ]
    either: Any = Union[tuple(kinds)]  # noqa: UP007 (made at run time)
    script = io.StringIO()
    with (
        _rules(tyro, completing=True),
        contextlib.redirect_stdout(script),
        contextlib.suppress(SystemExit),
    ):
        tyro.cli(
            either,
            args=["--tyro-print-completion", shell],
            prog=prog,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    return script.getvalue()


def _rules(tyro: Any, *, completing: bool = False) -> Any:
    """Return tyro's registry with the rules for records and their values, a context manager."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(lambda info: _reading(tyro.constructors, info.type, completing))
    registry.struct_rule(lambda info: _fields(tyro, info.type, info.default))
    return registry


def _joined(cls: type[Record], argv: Sequence[str]) -> list[str]:
    """Return `argv` with each text that may begin with a dash joined to its flag by `=`.

    Flags without a value of options that were switches get the value that they stand for.
    """
    marked = {name: known.metadata for name, known in cls.options().items()}
    texts = {flag(name) for name, marks in marked.items() if marks.get("verbatim")}
    switches = {
        flag(prefix + name): f"{flag(name)}={marks['switch'][on]}"
        for name, marks in marked.items()
        if "switch" in marks
        for on, prefix in enumerate(("no_", ""))
    }
    joined: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        alone = not words or words[0].startswith("-")
        if word in texts and words:
            word = f"{word}={words.pop(0)}"
        elif (name := word.replace("_", "-")) in switches and (alone or name.startswith("--no-")):
            word = switches[name]
        joined.append(word)
    return joined


def to_toml(
    config: Record, filled: Record | None = None, usual: Mapping[str, Any] | None = None
) -> str:
    """Return `config` as TOML that `--config` reads back; None is left out.

    Comments show what would follow without a line: the values of `filled` that `config` leaves out,
    and values equal to those of `usual`.
    """
    values, usual, lines = config.to_dict(), usual or {}, []
    for name, shown in (config if filled is None else filled).to_dict().items():
        value = values[name]
        if value is not None and (name not in usual or value != usual[name]):
            lines.append(f"{name} = {_toml_value(value)}")
        elif shown is not None:
            if type(shown) is float:
                shown = float(f"{shown:.12g}")  # lr / 10 as a person would write it
            lines.append(f"# {name} = {_toml_value(shown)}")
    return "".join(f"{line}\n" for line in lines)


def read_toml(path: str, tables: Collection[str] = ()) -> dict[str, Any]:
    """Return the flat table of the TOML file at `path`, dashes in names as underscores.

    Options may stand in `tables`, as under [model]. Raises ConfigError for a file that cannot be
    read, for another table, and for an option that stands twice.
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
    flat: dict[str, Any] = {}
    for table, content in values.items():
        inner = {table: content}
        if isinstance(content, dict) and tables:
            inner = content
            known_name(table, tables, f"table in {path}")
        names = {name.replace("-", "_"): value for name, value in inner.items()}
        if twice := flat.keys() & names.keys():
            raise ConfigError(f"{', '.join(sorted(twice))} stands twice in {path}")
        flat |= names
    return flat


def _refuse(cls: type[Record], words: Sequence[str], prog: str) -> None:
    """Raise ConfigError for the first of `words` that tyro could not place."""
    word, _, value = words[0].partition("=")
    if not word.startswith("-"):
        raise ConfigError(f"{words[0]!r} belongs to no flag; see {prog} --help")
    name, absent = word.lstrip("-").replace("-", "_"), cls.absent()
    reason = absent.get(name) or absent.get(name.removeprefix("no_"))
    if reason is not None:
        shown = " ".join((word, value or "".join(words[1:2]))).rstrip()
        raise ConfigError(f"{shown}: {reason}")
    names = ["--help"]
    for name, known in cls.options().items():
        names += [flag(name), *([flag("no_" + name)] if known.kind is bool else [])]
    known_name(word.replace("_", "-"), names, "flag")
    raise ConfigError(f"{words[0]!r} cannot be read; see {prog} --help")


def _fields(tyro: Any, kind: Any, default: Any) -> Any:
    """Return tyro's rule for a record: its fields, without a default where it is left out."""
    if not (isinstance(kind, type) and issubclass(kind, Record)):
        return None
    hints, sentences, fields = kinds(kind), kind.sentences(), []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = field.default if not isinstance(default, kind) else getattr(default, field.name)
        hint = "" if value is None or value == () else None
        marks = tyro.conf.arg(
            name=field.metadata.get("title"),
            help=sentences.get(field.name),
            help_behavior_hint=hint,
        )
        fields.append(
            tyro.constructors.StructFieldSpec(
                name=field.name,
                type=Annotated[hints[field.name], marks],
                default=tyro.MISSING if value is dataclasses.MISSING else value,
            )
        )
    return tyro.constructors.StructConstructorSpec(instantiate=kind, fields=tuple(fields))


def _reading(constructors: Any, kind: Any, completing: bool) -> Any:
    """Return tyro's rule for a value: any number of words, so that `Record` finds the errors.

    A script for completion needs one word, and the choices.
    """
    if get_origin(kind) is tuple:
        return None  # tyro's own rule: a flag that may be given several times
    inner = kind if get_origin(kind) is Literal else next(iter(get_args(kind)), kind)  # X | None
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    # What stands beside the first type: the words of a Literal, or the name of a type.
    others = [] if choices else [each for each in get_args(kind)[1:] if each is not type(None)]
    words = [word for each in others for word in get_args(each) or (each.__name__.upper(),)]
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
        nargs=1 if completing else "*",
        choices=choices or None if completing else None,
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
