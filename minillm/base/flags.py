"""The command line and TOML files of the programs: preset, then `--config` file, then flags, each
over the one before."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from minillm.base.errors import ConfigError
from minillm.training.config import PRESETS, Record, TrainConfig, checked_values, flag, known_name
from minillm.training.resolve import check_resume

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class TrainArgs(TrainConfig):
    """Train a GPT, on one process or over the ranks of mpirun."""

    config: str | None = None
    """TOML file with the same names; flags win over it."""
    print_config: bool = False
    """Print the resolved configuration as TOML and stop."""
    resume: str | None = None
    """Folder of a run, or one of its checkpoints, to continue."""

    def train_config(self) -> TrainConfig:
        """The options without those that only say how to start."""
        return TrainConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        )


def parse_train_args(
    argv: Sequence[str] | None = None,
    *,
    saved: Callable[[str], Mapping[str, Any]] | None = None,
    prog: str = "python -m minillm.train",
) -> TrainArgs:
    """The options of `argv` (default: the process's own) over those of `--config` over those of the
    preset.

    `saved` reads the configuration values held by the folder given to `--resume`; they then stand
    in for the preset, and what must not change is checked. Raises ConfigError for unknown or bad
    options, and SystemExit(0) after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = {name: _early_value(argv, name) for name in ("preset", "config", "resume")}
    file_values = {} if first["config"] is None else read_toml(first["config"])
    held: Mapping[str, Any] | None = None
    if first["resume"] is not None and saved is not None:
        held = saved(first["resume"])
        values = checked_values(TrainConfig, held, first["resume"])
    else:
        values = preset_values(first["preset"] or file_values.get("preset", TrainConfig.preset))
    args = parse_flags(TrainArgs, argv, prog=prog, default=TrainArgs(**{**values, **file_values}))
    if held is not None:
        check_resume(held, args.train_config())
    return args


def preset_values(name: str) -> dict[str, Any]:
    """What the preset called `name` sets, its name included. Raises ConfigError with close matches
    for any other name."""
    return {**PRESETS[known_name(name, PRESETS, "preset")], "preset": name}


def parse_flags(
    cls: type[ConfigT], argv: Sequence[str], *, prog: str, default: ConfigT | None = None
) -> ConfigT:
    """An instance of the dataclass `cls` from flags alone; every program's options go through here.

    `default` gives the values of flags left out (default: those of the fields). Raises ConfigError
    with one line for an unknown flag, a bad value or a word that belongs to no flag.
    """
    import tyro

    _check_names(cls, argv)
    errors = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    about = (cls.__doc__ or "").partition("\n")[0]
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls,
                args=list(argv),
                prog=prog,
                description=about,
                config=(tyro.conf.DisallowNone,),
                **given,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(f"{_first_paragraph(errors.getvalue())}; see {prog} --help") from None


def to_toml(config: Record) -> str:
    """`config` as TOML that `--config` reads back to the same values; what is None is left out."""
    return "".join(
        f"{name} = {_toml_value(value)}\n"
        for name, value in config.to_dict().items()
        if value is not None
    )


def read_toml(path: str) -> dict[str, Any]:
    """The training options in the TOML file at `path`, names with dashes or underscores. Raises
    ConfigError for a bad file or key."""
    import tomllib

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from None
    return checked_values(
        TrainConfig, {name.replace("-", "_"): value for name, value in values.items()}, path
    )


def _early_value(argv: Sequence[str], name: str) -> str | None:
    """The last value of a flag that decides the others' defaults, before the flags are parsed."""
    word = flag(name)
    found = None
    for position, argument in enumerate(argv):
        if argument == word and position + 1 < len(argv):
            found = argv[position + 1]
        elif argument.startswith(word + "="):
            found = argument.removeprefix(word + "=")
    return found


def _check_names(cls: type, argv: Sequence[str]) -> None:
    """Raises ConfigError with close matches for a flag that `cls` does not have."""
    known = ["--help"]
    for field in dataclasses.fields(cls):
        known += [flag(field.name)] + (
            ["--no-" + flag(field.name)[2:]] if field.type in (bool, "bool") else []
        )
    for argument in argv:
        if re.match(r"--[A-Za-z]", argument):
            known_name(argument.partition("=")[0].replace("_", "-"), known, "flag")


def _first_paragraph(boxed: str) -> str:
    """The sentence under the title of a boxed error message, whether the box is drawn in Unicode or
    in ASCII."""
    title, *lines = [line.strip("│|╭╮╰╯+ ") for line in boxed.splitlines()] or [""]
    sentence: list[str] = []
    for line in lines:
        if not re.fullmatch("[─-]*", line):
            sentence.append(line)
        elif sentence:
            break
    return (" ".join(sentence) or title).rstrip(".")


def _toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # a JSON string is a TOML basic string but for DEL
    return repr(value)
