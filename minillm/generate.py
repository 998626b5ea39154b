"""Write text with a trained model: `python -m minillm.generate RUN --prompt TEXT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import plural
from minillm.base.record import option
from minillm.base.terminal import printable, utf8_input
from minillm.comm.agreement import AgreedError, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.launchers import launched
from minillm.comm.process import run_program
from minillm.inference.asking import ask, piped, whole_input
from minillm.inference.loading import ReadOptions, load_trained, named_run, open_checkpoint, place
from minillm.inference.text import end_ids, prompt_ids
from minillm.inference.writing import Prompt, Writer, WritingOptions

PROMPT = "the prompt"  # in messages, where there is one alone


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ReadOptions, WritingOptions):
    """Continue prompts with a trained model, and print the texts as they are written.

    python -m minillm.generate runs/nano --prompt 'def ' --samples 3
    """

    checkpoint: str = option(path=True)
    """Folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file; may also be
    the first word, without the flag."""
    prompt: str | None = option(None, verbatim=True)
    """Text to continue; -: all of standard input; left out: each line that is piped in, else a line
    end."""
    prompts: str | None = option(None, path=True, verbatim=True)
    """File of prompts, one a line; -: the lines of standard input."""
    interactive: bool = False
    """Ask for prompts, one after another, until Ctrl-D."""
    samples: int = option(1, at_least=1)
    """Texts for each prompt. The first has the random seed of --seed, each further one the next."""
    batch: int = option(16, at_least=1)
    """Texts that each replica writes at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and not self.by_chance:
            raise ConfigError(
                f"--samples {self.samples} would be the same text each time; use a --temperature "
                "above 0, and no --beam"
            )
        if self.interactive and self.prompt is not None:
            raise ConfigError("--interactive asks for prompts; leave --prompt out")
        if self.prompts is not None and (self.interactive or self.prompt is not None):
            other = "--interactive" if self.interactive else "--prompt"
            raise ConfigError(f"--prompts {self.prompts} and {other} both give prompts; use one")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _generate, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> GenerateArgs:
    return parse_flags(GenerateArgs, named_run(argv), prog="python -m minillm.generate")


def _generate(comm: Communicator, args: GenerateArgs) -> None:
    """Write texts for every prompt. Collective."""
    utf8_input()
    with known_to_all():
        given: list[tuple[str, str | None]] | None
        given = None if args.interactive else from_first(comm, lambda: read_prompts(args))
        placed, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, placed, args.best)
        opened.config.family.check_writes()
        config = opened.resolve(args, comm.size, texts=args.samples * len(given or [None]))
        model = load_trained(opened, config, placed, device)
    tokenizer = opened.tokenizer
    program = Program(comm, args, Writer(model, tokenizer, args, end_ids(opened.vocabulary)))
    if given is not None:
        with known_to_all():
            ids = program.ids(given)
        program.write(ids)
        return
    while (line := from_first(comm, ask)) is not None:
        if not line:
            continue
        try:
            with known_to_all():
                ids = program.ids([(PROMPT, line)])
        except AgreedError as error:
            if comm.rank == 0:
                print(f"error: {error}", file=sys.stderr)
            continue
        try:
            program.write(ids)
        except KeyboardInterrupt:  # ends this text; at the prompt it ends the program
            if comm.size > 1:
                raise
            print()


class Program:
    """Prompts in, texts out, on this rank."""

    def __init__(self, comm: Communicator, args: GenerateArgs, writer: Writer) -> None:
        self.args, self.writer, self._first = args, writer, comm.rank == 0
        # A launcher's pipe may lead to a terminal.
        self._escapes = sys.stdout.isatty() or launched() is not None

    def ids(self, prompts: Sequence[tuple[str, str | None]]) -> list[list[int]]:
        """Return the ids of prompts, each with its origin for messages; None is the default one.

        Raises ConfigError for a prompt that has none.
        """
        generator, found, long = self.writer.generator, [], []
        for origin, prompt in prompts:
            try:
                ids = prompt_ids(self.writer.tokenizer, prompt)
            except ConfigError as error:
                where = "" if origin == PROMPT else f"{origin}: "
                raise ConfigError(f"{where}{error}") from None
            found.append(ids)
            if generator.reads(len(ids)) < len(ids):
                long.append((origin, len(ids)))
        if long:
            origin, size = long[0]
            others = f", and {len(long) - 1} more are too long" if len(long) > 1 else ""
            self._note(
                f"{origin} has {size} tokens, and the context is {generator.context}; the model "
                f"reads the last {generator.reads(size)}{others}"
            )
        return found

    def write(self, prompts: Sequence[Sequence[int]]) -> None:
        """Write all samples that continue the prompts. Collective."""
        wanted = [
            Prompt(ids, self.args.seed + sample)
            for ids in prompts
            for sample in range(self.args.samples)
        ]
        starts = [self.writer.tokenizer.decode(prompt.ids) for prompt in wanted]
        screen, self.writer.num_full = Screen(starts, self._escapes), 0
        self.writer.write(wanted, self.args.batch, screen.show)
        if self.writer.num_full:
            texts = plural(self.writer.num_full, "text")
            self._note(
                f"{texts} ended where the context of {self.writer.generator.context} tokens was "
                "full; --window goes on, and the model forgets the older half"
            )

    def _note(self, text: str) -> None:
        if self._first:
            print(f"note: {text}", file=sys.stderr)


class Screen:
    """Texts in the order of their prompts, with a line between them.

    The first one that has not ended is shown as it grows, later ones when it is their turn.
    """

    def __init__(self, starts: Sequence[str], escapes: bool) -> None:
        self._waiting, self._ended = list(starts), [False] * len(starts)
        self._escapes, self._turn = escapes, 0
        self._print()

    def show(self, number: int, piece: str, last: bool) -> None:
        """Add a piece to a text."""
        self._waiting[number] += piece
        self._ended[number] |= last
        while number == self._turn or self._ended[self._turn]:
            self._print()
            if not self._ended[self._turn]:
                return
            print(flush=True)
            self._turn += 1
            if self._turn == len(self._ended):
                return
            print("---")

    def _print(self) -> None:
        piece = self._waiting[self._turn]
        self._waiting[self._turn] = ""
        sys.stdout.write(printable(piece) if self._escapes else piece)
        sys.stdout.flush()


def read_prompts(args: GenerateArgs) -> list[tuple[str, str | None]]:
    """Return the prompts of the flags, or of standard input, each with its origin for messages.

    None is the default prompt. Raises ConfigError for a file that cannot be read, or has none.
    """
    if args.prompt == "-":
        return [("standard input", whole_input().removesuffix("\n"))]
    if args.prompt is not None:
        return [(PROMPT, args.prompt)]
    if args.prompts is None and not piped():
        return [(PROMPT, None)]
    name, text = "standard input", ""
    if args.prompts in (None, "-"):
        text = whole_input()
    else:
        name = args.prompts
        text = _read_file(name)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    found = [(f"line {n} of {name}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found and args.prompts is None:
        return [(PROMPT, None)]
    if not found:
        raise ConfigError(
            f"--prompts {args.prompts} holds no prompt: {plural(len(text), 'character')}, and no "
            "line with text"
        )
    return list(found)


def _read_file(name: str) -> str:
    try:
        return Path(name).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--prompts {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {name} is not UTF-8 text: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
