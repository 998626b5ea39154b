"""Tokenize a text into the cache: `mpirun -n 4 minillm prepare --data TEXT`.

Training does the same at its first start. A later start with the same text and tokenizer maps the
tokens.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.base.flags import parse_flags
from minillm.base.log import Log
from minillm.base.record import flag
from minillm.comm.agreement import known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.corpus import corpus_of
from minillm.data.options import DataOptions


@dataclass(frozen=True, kw_only=True)
class PrepareArgs(DataOptions):
    """Tokenize a text on all ranks and keep the tokens, which training then maps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _prepare, argv)


def _parse(argv: Sequence[str]) -> PrepareArgs:
    return parse_flags(PrepareArgs, argv, prog="minillm prepare")


def _prepare(comm: Communicator, args: PrepareArgs) -> None:
    with known_to_all():
        corpus = corpus_of(args, context=1, prepare=True, comm=comm)
    log, defaults = Log(comm.rank), PrepareArgs().to_dict()
    given = {name: value for name, value in args.to_dict().items() if value != defaults[name]}
    given = {"data": args.data} | given  # in any case: a preset may have other data
    words = " ".join(f"{flag(name)} {shlex.quote(value)}" for name, value in given.items())
    log(f"data    {corpus.describe()}")
    log(f"ready   train with: python -m minillm.train {words}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
