"""Command line of a training run: preset, then `--config` file, then flags, each over the last.

The family of the model is read before everything else: it decides which other options there are.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags, read_toml, split_flags
from minillm.base.record import Record, option, with_defaults
from minillm.models.family import DEFAULT, family_of_preset
from minillm.training.config import (
    RunConfig,
    check_resume,
    check_weights,
    default_values,
    from_weights,
    preset_values,
)

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_NAMED = ("model", "preset")  # options that decide which others there are


@dataclass(frozen=True, kw_only=True)
class GoingOnOptions(Record):
    """Start of the run, as in `--resume runs/nano`; not part of its configuration."""

    config: str | None = option(None, path=True)
    """TOML file with the same names, also in tables such as [model]; flags win over it."""
    print_config: bool = False
    """Print what differs from the preset as TOML, with all other values as comments, and stop."""
    resume: str | None = option(None, path=True)
    """Folder of a run, or one of its checkpoints, to continue in that folder; with --out as a new
    run, which begins as a copy."""


@dataclass(frozen=True, kw_only=True)
class StartOptions(GoingOnOptions):
    """Start of the run, as in `--resume runs/nano`; not part of its configuration."""

    init_from: str | None = option(None, path=True)
    """Folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file, whose
    weights a new run starts from; its model, tokenizer and text are the defaults."""
    best: bool = False
    """Start from the checkpoint of --init-from that was best on held-out data, not the newest."""

    def __post_init__(self) -> None:
        """Raise ConfigError for flags that exclude each other."""
        super().__post_init__()
        if self.resume is not None and self.init_from is not None:
            raise ConfigError(
                "--resume continues a run and --init-from starts a new one from its weights; use "
                "one of them"
            )
        if self.best and self.init_from is None:
            raise ConfigError(
                "--best goes with --init-from; to resume from an earlier checkpoint, pass its "
                "folder to --resume"
            )


@dataclass(frozen=True, kw_only=True)
class _Origins(StartOptions):
    """Flags that decide the defaults of the others."""

    model: str | None = None
    preset: str | None = None


def parse_train_args(
    argv: Sequence[str] | None = None,
    *,
    saved: Callable[[StartOptions], Mapping[str, Any]] | None = None,
    prog: str = "python -m minillm.train",
    cls: type[ConfigT] = RunConfig,  # type: ignore[assignment]
    defaults: Mapping[str, Any] | None = None,
) -> tuple[StartOptions, ConfigT]:
    """Return the options of `argv` (default: the process's own) over those of file and preset.

    `saved` reads the configuration held by the checkpoint that the start options name. It replaces
    the preset for `--resume`, and the model of the preset for `--init-from`. What must not change
    is checked. `defaults` replace values of the preset. Raises ConfigError for unknown or bad
    options, and SystemExit(0) after `--help`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first, rest = split_flags(_Origins, words, prog=prog, add_help=False)
    start = StartOptions(**{name: getattr(first, name) for name in StartOptions().to_dict()})
    from_file = {} if first.config is None else read_toml(first.config, cls.titles())
    origin = start.resume or start.init_from
    if origin is not None and saved is None:
        raise ConfigError(f"{prog} begins with initial weights; leave {origin} out")
    held = saved(start) if saved is not None and origin is not None else None
    chosen = {name: value for name in _NAMED if (value := getattr(first, name)) is not None}
    named = {**from_file, **chosen}
    named = {name: named[name] for name in _NAMED if isinstance(named.get(name), str)}
    model = _model(named, held, start)
    # Before the preset, so that errors name the file.
    cls.from_dict({"model": model, **from_file}, str(first.config))
    if held is not None and start.resume is not None:
        base = cls.from_dict(held, str(origin))
    else:
        values = preset_values(named["preset"]) if "preset" in named else default_values(model)
        base = cls.from_dict({**values, **(defaults or {})})
        if held is not None:
            base = base.replace(**from_weights(held))
    config = _parse_rest(base.replace(**{**from_file, **chosen}), start, rest, prog)
    batch, tokens = config.optimization.batch, config.optimization.batch_tokens
    if tokens and any(word.split("=")[0] == "--batch" for word in rest):
        raise ConfigError(
            f"--batch {batch} and --batch-tokens {tokens} both say how large a step is; leave one "
            "out, or pass --batch-tokens 0"
        )
    if held is not None:
        (check_resume if start.resume is not None else check_weights)(held, config)
    return start, config


def _model(named: Mapping[str, str], held: Mapping[str, Any] | None, start: StartOptions) -> str:
    """Return the family of a run: that of its checkpoint, of `--model`, or of the preset.

    Raises ConfigError if they differ.
    """
    model, preset = named.get("model"), named.get("preset")
    if held is not None:
        had = held.get("model", DEFAULT)
        for name, other in (("model", model), ("preset", preset and family_of_preset(preset).name)):
            if other not in (None, had):
                raise ConfigError(
                    f"{start.resume or start.init_from} holds a model of --model {had}, but "
                    f"--{name} {named[name]} asks for another; leave it out, or train a new model"
                )
        return had
    if preset is None:
        return model or DEFAULT
    found = family_of_preset(preset)
    if model not in (None, found.name):
        raise ConfigError(
            f"--preset {preset} is of --model {found.name}, not {model}; leave one of them out"
        )
    return found.name


def with_start(cls: type[ConfigT]) -> type[ConfigT]:
    """Return `cls` with the start options as a further room, as `--help` lists them."""
    return with_defaults(cls, start=StartOptions())


def _parse_rest(default: ConfigT, start: StartOptions, words: list[str], prog: str) -> ConfigT:
    """Return `default` with the flags of `words` applied; `--help` lists those of `start` too."""
    cls = type(default)
    rooms = {field.name: getattr(default, field.name) for field in dataclasses.fields(cls)}
    whole: Any = with_start(cls)
    found = parse_flags(whole, words, prog=prog, default=whole(start=start, **rooms))
    return cls(**{name: getattr(found, name) for name in rooms})
