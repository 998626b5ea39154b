"""Translate lines with a trained model: `minillm translate RUN < in > out`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import option
from minillm.base.terminal import utf8_input
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.sentence_pieces import marks_of
from minillm.data.tokenizers import Tokenizer
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Rule
from minillm.inference.loading import (
    ReadOptions,
    load_trained,
    named_run,
    open_checkpoint,
    place,
)
from minillm.inference.translator import GREEDY
from minillm.inference.written import TranslationWriter, marked_tokenizer


@dataclass(frozen=True, kw_only=True)
class TranslateArgs(ReadOptions, BeamOptions):
    """Translate each line of standard input, and print the translations in the same order.

    minillm translate runs/translate --beam 5 < sentences.txt > translations.txt
    """

    checkpoint: str = option(path=True)
    """Folder of a run, one of its checkpoints, or a Hugging Face folder; may also be the first
    word, without the flag."""
    batch: int = option(32, at_least=1)
    """Lines that each replica translates at once."""
    tokens: int | None = option(None, at_least=1)
    """Most tokens of a translation; left out: as many as the context holds."""

    @property
    def rule(self) -> Rule:
        """Rule that chooses the tokens: a beam search, or the likeliest token after token."""
        return Beam(self) if self.beam > 1 else GREEDY


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _translate, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> TranslateArgs:
    return parse_flags(TranslateArgs, named_run(argv), prog="minillm translate")


def _translate(comm: Communicator, args: TranslateArgs) -> None:
    """Translate standard input. Collective."""
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, placed, args.best)
        opened.config.family.check_writes("translation")
        config = opened.resolve(args, comm.size)
        tokenizer = agree(placed, lambda: marked_tokenizer(opened), ConfigError)
        lines = from_first(comm, _input)
        sources = encoded_lines(lines, tokenizer, config.model.context)
        model = load_trained(opened, config, placed, device)
    write = TranslationWriter(model, tokenizer, args.rule, args.tokens)
    replicas = model.mesh.axis("dp")
    stride = args.batch * replicas.size
    for first in range(0, len(lines), stride):
        own = sources[first : first + stride][replicas.rank :: replicas.size]
        dealt = replicas.gather_json(write.of_ids(own))
        if comm.rank == 0:
            for i in range(min(stride, len(lines) - first)):
                print(dealt[i % replicas.size][i // replicas.size])
            sys.stdout.flush()


def encoded_lines(lines: Sequence[str], tokenizer: Tokenizer, context: int) -> list[IntArray]:
    """Return the ids of each line and its end, int64.

    Raises ConfigError naming the first line that has no ids or more than `context`.
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            ids = tokenizer.encode(line)
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None
        if len(ids) >= context:
            raise ConfigError(
                f"line {number} has {len(ids)} tokens, and the model reads {context - 1} and an "
                "end; cut it into sentences"
            )
        found.append(np.append(ids, marks_of(tokenizer).end).astype(np.int64))
    return found


def _input() -> list[str]:
    utf8_input()
    try:
        return [line.strip() for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8: {error.reason}") from None


if __name__ == "__main__":
    sys.exit(main())
