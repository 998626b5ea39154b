"""Command lines of a run that may start several times: its first one, and the one that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minillm import finetune
from minillm.base.errors import ConfigError
from minillm.base.flags import split_flags
from minillm.base.record import Record, option
from minillm.checkpoint.find import SUBFOLDER, is_checkpoint, run_of
from minillm.checkpoint.manifest import MANIFEST
from minillm.comm.options import CommOptions
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.config import RunConfig
from minillm.training.origin import saved_options
from minillm.training.resolve import resolve

# Tokens of a tokenizer that is not read yet: divisible by every number up to 12, and by 16.
_SOME_VOCAB = 55440
_TRAIN = "python -m minillm.train"


@dataclass(frozen=True, kw_only=True)
class _Beginning(Record):
    """Flags of train that name the folder of a run and its origin."""

    out: str | None = option(None, path=True)
    resume: str | None = option(None, path=True)
    init_from: str | None = option(None, path=True)
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class _Tuning(_Beginning):
    """Flags of finetune for the same, where --model names weights."""

    model: str = option("none", path=True)


class Program(NamedTuple):
    """Program whose runs have folders to go on in."""

    module: str
    parse: Callable[[list[str]], tuple[StartOptions, RunConfig]]
    beginning: type[_Beginning]


TRAIN = Program(
    "minillm.train", lambda words: parse_train_args(words, saved=saved_options), _Beginning
)
PROGRAMS = {"train": TRAIN, "finetune": Program("minillm.finetune", finetune.parse, _Tuning)}
"""Every such program, by its name as a word of minillm."""


class Starts(NamedTuple):
    """Flags of a program for each start of one run."""

    first: list[str]
    again: list[str]  # from the newest checkpoint in `run`
    run: str


def starts(words: Sequence[str], default: str, program: Program = TRAIN) -> Starts:
    """Return the flags of the first start and of every later one; `default` is the run's folder.

    A later start keeps all flags but the origin, which is then the run's own newest checkpoint.
    Raises ConfigError if the flags name a checkpoint outside any run, without a folder to write to.
    """
    prog = f"python -m {program.module}"
    begin, rest = split_flags(program.beginning, words, prog=prog, add_help=False)
    run: str | Path | None = begin.out
    if run is None and begin.resume is not None:
        run = run_of(Path(begin.resume))
        if run is None:
            raise ConfigError(
                f"--resume {begin.resume} is a checkpoint outside the folder of a run; pass --out "
                "FOLDER for the run that goes on from it"
            )
    folder = str(default if run is None else run)
    first = [*words, *(["--out", folder] if run is None else [])]
    return Starts(first, [*rest, "--resume", folder], folder)


def check_job(words: Sequence[str], ranks: int, per_node: int) -> str:
    """Raise ConfigError for flags of train that would end the job at one of its starts.

    Returns the course after the loss of a rank (see `check_words`).
    """
    begin, _ = _split(words)
    if begin.resume is not None and is_checkpoint(Path(begin.resume)) and begin.out is None:
        raise ConfigError(
            f"--resume {begin.resume} would go back to this step at every start of the job; "
            "pass --out FOLDER for a new run from it"
        )
    return check_words(words, ranks, per_node)


def check_words(words: Sequence[str], ranks: int, per_node: int) -> str:
    """Raise ConfigError for flags of train that would end a run at its start.

    What only the nodes know, such as data and checkpoints, is not read. Returns the course after
    the loss of a rank, that of `--on-failure`.
    """
    begin, rest = _split(words)
    if begin.resume is not None or begin.init_from is not None:
        return split_flags(CommOptions, rest, prog=_TRAIN, add_help=False)[0].on_failure
    options: RunConfig = parse_train_args(rest)[1]
    _resolve(options, ranks, per_node)
    return options.comm.on_failure


def _split(words: Sequence[str]) -> tuple[_Beginning, list[str]]:
    """Return the flags of train that name a folder or an origin, and the others."""
    return split_flags(_Beginning, words, prog=_TRAIN, add_help=False)


def fits(options: RunConfig, ranks: int) -> bool:
    """Return True if `ranks` ranks can run these options."""
    try:
        _resolve(options, ranks, ranks)
    except ConfigError:
        return False
    return True


def _resolve(options: RunConfig, ranks: int, per_node: int) -> None:
    """Raise ConfigError for a layout that does not fit the ranks."""
    vocab = getattr(options.shape, "vocab", None) or _SOME_VOCAB
    resolve(options, ranks, vocab, per_node)


def script(command: Sequence[str], found: Starts, again_if: str = "", after: str = "") -> str:
    """Return lines of bash that start the run or go on with it, and save at SIGTERM and SIGUSR1.

    `command` gets the flags of train as its last words. `again_if` is a further condition of going
    on. `after` follows the end; there `$ending` holds the name of such a signal, and `$status` the
    exit status.
    """
    checkpoints = f"{shlex.quote(found.run)}/{SUBFOLDER}/step-*/{MANIFEST}"
    condition = f"{again_if}ls {checkpoints} > /dev/null 2>&1"
    return f"""\
if {condition}; then
    set -- {shlex.join(found.again)}
else
    set -- {shlex.join(found.first)}
fi
{shlex.join(command)} "$@" &
pid=$! ending= signals=0 seen=none
trap 'ending=TERM signals=$((signals + 1)); kill -USR1 "$pid" 2> /dev/null' TERM
trap 'ending=USR1 signals=$((signals + 1)); kill -USR1 "$pid" 2> /dev/null' USR1
# A signal ends a wait with a status above 128, also if the run has ended meanwhile.
until [ "$seen" = "$signals" ]; do
    seen=$signals
    wait "$pid"; now=$?
    [ "$now" -eq 127 ] || status=$now
done
{after}exit "$status"
"""
