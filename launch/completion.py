"""Completion of the command in a shell: `eval "$(minillm completion bash)"`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from minillm.base.errors import ConfigError
from minillm.base.flags import completion_script
from minillm.base.record import Record, known_name
from minillm.bench.compare import CompareConfig
from minillm.comm.process import main_guard
from minillm.data.prepare import PrepareArgs
from minillm.evaluate import EvaluateArgs
from minillm.finetune import finetune_args
from minillm.generate import GenerateArgs
from minillm.inference.chat import ChatArgs
from minillm.inference.embed import EmbedArgs
from minillm.inference.predict import PredictArgs
from minillm.inference.translate import TranslateArgs
from minillm.schedule import ScheduleArgs
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
# Program -> its options. Those of the programs that are not named here are not completed.
OPTIONS: Mapping[str, type[Record]] = {
    "train": with_start(RunConfig),
    "finetune": finetune_args(),
    "prepare": PrepareArgs,
    "evaluate": EvaluateArgs,
    "generate": GenerateArgs,
    "chat": ChatArgs,
    "translate": TranslateArgs,
    "embed": EmbedArgs,
    "predict": PredictArgs,
    "import": ImportArgs,
    "export": ExportArgs,
    "plot": PlotArgs,
    "verify": with_start(VerifyConfig),
    "compare": with_start(CompareConfig),
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
