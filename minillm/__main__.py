"""Command `minillm`: dispatcher of the programs, modules with a `main` that are imported lazily."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from minillm.base.errors import MinillmError
from minillm.base.record import known_name
from minillm.base.requirements import own_version
from minillm.base.terminal import one_line, printing


class Program(NamedTuple):
    """Program of the command."""

    module: str  # has a `main`; python -m MODULE is the same program
    sentence: str


PROGRAMS = {
    "train": Program("minillm.train", "train a model, alone or over the ranks of mpirun"),
    "finetune": Program("minillm.finetune", "train an encoder for a task on labelled texts"),
    "prepare": Program("minillm.data.prepare", "tokenize a text once, for many runs"),
    "tokenizer": Program(
        "minillm.data.tokenizer_program", "learn a BPE or WordPiece vocabulary, or encode a text"
    ),
    "evaluate": Program("minillm.evaluate", "measure a checkpoint, or score texts against others"),
    "generate": Program("minillm.generate", "write text with a checkpoint"),
    "chat": Program("minillm.inference.chat", "talk with a checkpoint"),
    "translate": Program("minillm.inference.translate", "translate lines with a checkpoint"),
    "embed": Program("minillm.inference.embed", "embed lines of text with an encoder"),
    "predict": Program("minillm.inference.predict", "predict the labels of texts"),
    "import": Program(
        "minillm.weights.importing", "copy weights of Hugging Face or GGUF files into a run"
    ),
    "export": Program("minillm.weights.exporting", "write weights for transformers or llama.cpp"),
    "plot": Program("minillm.training.plot", "draw the curves of runs"),
    "verify": Program("minillm.verify", "compare a layout with one rank"),
    "compare": Program("minillm.bench.compare", "compare data-parallel methods in one table"),
    "schedule": Program("minillm.schedule", "draw a pipeline schedule"),
    "bench": Program("minillm.bench", "time the training step and the kernels"),
    "emulator": Program(
        "minillm.kernels.emulator.__main__", "run a CUDA kernel on the CPU and watch one thread"
    ),
    "launch": Program("minillm.launch.program", "print a job for Slurm, Kubernetes or mpirun"),
    "supervise": Program("minillm.launch.supervise", "start a run again whenever it fails"),
    "completion": Program("minillm.launch.completion", "print a script for completion in a shell"),
    "doctor": Program("minillm.doctor", "look over this machine and name what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that `argv` names, with the arguments after its name.

    The default is the command line of the process. Returns the exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return printing(lambda: _run(words))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"minillm {own_version()}")
        return 0
    try:
        program = PROGRAMS[known_name(argv[0], PROGRAMS, "program")]
    except MinillmError as error:
        print(f"minillm: {one_line(str(error))}", file=sys.stderr)
        return 2
    return importlib.import_module(program.module).main(argv[1:])


def usage() -> str:
    """One line for each program."""
    width = max(map(len, PROGRAMS)) + 2
    lines = [f"  {name:<{width}}{program.sentence}" for name, program in PROGRAMS.items()]
    head = ["usage: minillm PROGRAM [OPTIONS]", "       minillm --version", "", "programs:"]
    return "\n".join(
        [
            *head,
            *lines,
            "",
            "minillm PROGRAM --help lists the options of one.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
