"""Completion of the command in a shell: `eval "$(minillm completion bash)"`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from minillm.base.errors import ConfigError
from minillm.base.flags import completion_script
from minillm.base.record import Record, kinds, known_name, with_defaults
from minillm.bench.compare import CompareConfig
from minillm.comm.process import main_guard
from minillm.data.prepare import PrepareArgs
from minillm.evaluate import EvaluateArgs, ScoreArgs
from minillm.finetune import TASKS, finetune_args
from minillm.generate import GenerateArgs
from minillm.inference.chat import ChatArgs
from minillm.inference.embed import EmbedArgs
from minillm.inference.predict import PredictArgs
from minillm.inference.translate import TranslateArgs
from minillm.inference.written import OPTIONS as TEXTS
from minillm.models.family import families
from minillm.schedule import ScheduleArgs
from minillm.tasks.objectives import objective
from minillm.tasks.protocol import Predicting
from minillm.training.arguments import with_start
from minillm.training.config import RunConfig
from minillm.training.plot import PlotArgs
from minillm.verify import VerifyConfig
from minillm.weights.exporting import ExportArgs
from minillm.weights.importing import ImportArgs

# Shell -> the line that turns completion on, and the file for it.
SHELLS = {
    "bash": 'eval "$(minillm completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(minillm completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": "minillm completion fish | source   # in ~/.config/fish/config.fish",
}


def together(records: Iterable[type[Record]]) -> type[Record]:
    """Return a record with every option of `records`, each optional, with the choices of all."""
    found: dict[str, list[Any]] = {}
    sentences: dict[str, str] = {}
    each: type[Record] = Record
    for each in records:
        rooms = kinds(each)
        for name, known in each.options().items():
            found.setdefault(name, []).append(known.kind)
            home: type[Record] = each if known.room is None else rooms[known.room]
            sentences.setdefault(name, home.sentences().get(name, ""))
    return dataclasses.make_dataclass(
        each.__name__,
        [(name, *_either(types)) for name, types in found.items()],
        bases=(Record,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": each.__doc__, "sentences": classmethod(lambda cls: sentences)},
    )


def _either(types: Sequence[Any]) -> tuple[Any, Any]:
    """Return a type with the choices of all `types`, and the default of its field."""
    if bool in types:
        return bool, dataclasses.field(default=False)
    if get_origin(types[0]) is tuple:
        return types[0], dataclasses.field(default=())
    inner = [part for kind in types for part in (get_args(kind) if _is_union(kind) else (kind,))]
    words = [word for part in inner if get_origin(part) is Literal for word in get_args(part)]
    kind: Any = Literal[tuple(dict.fromkeys(words))] if words else inner[0]
    return kind | None, dataclasses.field(default=None)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _runs(cls: type[RunConfig]) -> type[Record]:
    """Return the options of a run of any family."""
    return together(with_start(cls.of(name)) for name in families())


def _measured() -> Iterator[type[Record]]:
    """Yield the options of `minillm evaluate` for each family, and for texts alone."""
    for each in families().values():
        rooms: dict[str, Record] = {"asked": objective(each.objective).measured()}
        if (texts := TEXTS.get(each.writes)) is not None:
            rooms["texts"] = texts
        yield with_defaults(EvaluateArgs, **rooms)
    yield ScoreArgs


def _predicted() -> Iterator[type[Record]]:
    """Yield the options of `minillm predict` for each objective whose models predict."""
    for each in families().values():
        if isinstance(of := objective(each.objective), Predicting):
            yield with_defaults(PredictArgs, asked=of.predicted())


# Program -> its options. Those of the programs that are not named here are not completed.
OPTIONS: Mapping[str, type[Record]] = {
    "train": _runs(RunConfig),
    "finetune": together(map(finetune_args, TASKS)),
    "prepare": PrepareArgs,
    "evaluate": together(_measured()),
    "generate": GenerateArgs,
    "chat": ChatArgs,
    "translate": TranslateArgs,
    "embed": EmbedArgs,
    "predict": together(_predicted()),
    "import": ImportArgs,
    "export": ExportArgs,
    "plot": PlotArgs,
    "verify": _runs(VerifyConfig),
    "compare": _runs(CompareConfig),
    "schedule": ScheduleArgs,
}
OTHERS = ("tokenizer", "bench", "emulator", "launch", "supervise", "completion", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script for the shell that `argv` names; return the exit status."""
    return main_guard(lambda: _print(list(sys.argv[1:] if argv is None else argv)))


def _print(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print("usage: minillm completion SHELL\n\nPrint a script that completes minillm:\n")
        print("\n".join(f"  {line}" for line in SHELLS.values()))
        return 0
    if len(argv) != 1:
        raise ConfigError(f"name one shell: {', '.join(SHELLS)}; see minillm completion --help")
    shell = known_name(argv[0], SHELLS, "shell")
    print(completion_script({**OPTIONS, **dict.fromkeys(OTHERS, Record)}, shell, "minillm"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
