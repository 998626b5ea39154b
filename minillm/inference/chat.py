"""Talk with a trained model: `minillm chat RUN`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import option
from minillm.base.terminal import printable, utf8_input
from minillm.comm.agreement import AgreedError, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.launchers import launched
from minillm.comm.process import run_program
from minillm.data.templates import Message, Template, template_of
from minillm.inference.asking import ask
from minillm.inference.loading import ReadOptions, load_trained, named_run, open_checkpoint, place
from minillm.inference.rows import Rows
from minillm.inference.text import end_ids
from minillm.inference.writing import Line, Prompt, Show, Writer, WritingOptions

COMMANDS = {"/reset": "forgets the conversation", "/quit": "ends the program"}


@dataclass(frozen=True, kw_only=True)
class ChatArgs(ReadOptions, WritingOptions):
    """Talk with a model: each line of standard input is a turn, and the reply follows.

    minillm chat models/smollm2-instruct.gguf --temperature 0.2

    /reset forgets the conversation, /quit or Ctrl-D ends it, and Ctrl-C ends a reply.
    """

    checkpoint: str = option(path=True)
    """Folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file; may also be
    the first word, without the flag."""
    system: str | None = option(None, verbatim=True)
    """First message, which says how to reply; left out: that of the template, or none."""
    template: Literal["auto", "chatml", "plain"] = "auto"
    """Text around turns: that of the model's files (auto), <|im_start|> and <|im_end|> (chatml), or
    the words User and Assistant (plain)."""
    tokens: int = option(512, at_least=1)
    """Most tokens of a reply."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _chat, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> ChatArgs:
    return parse_flags(ChatArgs, named_run(argv), prog="minillm chat")


def _chat(comm: Communicator, args: ChatArgs) -> None:
    """Answer each line of standard input. Collective."""
    utf8_input()
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, placed, args.best)
        opened.config.family.check_writes()
        template = template_of(opened.vocabulary, args.template)
        config = opened.resolve(args, comm.size, texts=1)
        model = load_trained(opened, config, placed, device)
    asked = replace(args, stop=(*args.stop, *template.stops))
    writer = Writer(model, opened.tokenizer, asked, end_ids(opened.vocabulary))
    conversation = Conversation(writer, template, args.system)
    trained = opened.vocabulary.get("template")
    if template.name not in (args.template, trained) and comm.rank == 0:
        print(f"note: the model has no chat template; {template.name} is used", file=sys.stderr)
    escapes = sys.stdout.isatty() or launched() is not None

    def show(number: int, piece: str, last: bool) -> None:
        print(printable(piece) if escapes else piece, end="\n" if last else "", flush=True)

    while (line := from_first(comm, ask)) not in (None, "/quit"):
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/") and " " not in line:
            known = ", ".join(f"{name} {what}" for name, what in COMMANDS.items())
            _say(comm, f"error: {line} is no command; {known}")
        elif line.strip():
            _answer(comm, conversation, line, show)


def _answer(comm: Communicator, conversation: Conversation, line: str, show: Show) -> None:
    forgotten = conversation.num_forgotten
    try:
        with known_to_all():
            turn = conversation.turn(line)
    except AgreedError as error:
        _say(comm, f"error: {error}")
        return
    generator = conversation.writer.generator
    reads, size = generator.reads(len(turn.ids)), len(turn.ids)
    if reads < size:
        _say(comm, f"note: the turn has {size} tokens; the model reads the last {reads}")
    try:
        conversation.reply(turn, show)
    except KeyboardInterrupt:  # ends the reply; at the prompt it ends the program
        if comm.size > 1:
            raise
        print()
    if conversation.full:
        _say(comm, "note: the reply ended where the context was full; --window goes on")
    if conversation.num_forgotten > forgotten:
        context = generator.context
        _say(comm, f"note: the context holds {context} tokens; the oldest turns are forgotten")


def _say(comm: Communicator, text: str) -> None:
    if comm.rank == 0:
        print(text, file=sys.stderr, flush=True)


class Turn(NamedTuple):
    """Turn of the user, ready to be read."""

    turns: Sequence[Message]  # all so far, this one included
    ids: Sequence[int]  # of the text that the template makes of them
    skipped: int  # old ones that are left out of it


class Conversation:
    """Turns of a chat, and the cache of what the model has read of them.

    Each turn is rendered with all before it. What the text has in common with the one that was read
    before stays in the cache. Collective over tp and pp.
    """

    def __init__(self, writer: Writer, template: Template, system: str | None) -> None:
        self.writer, self.template = writer, template
        self._system = [] if system is None else [Message("system", system)]
        self.full = False
        """True if the last reply ended because the context was full."""
        self.num_forgotten = 0
        """Old turns that the context has no room for."""
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns: list[Message] = []
        self._rows: Rows | None = None
        self.num_forgotten = 0

    def turn(self, text: str) -> Turn:
        """Return a turn of the user behind those so far, without the oldest if they are too long.

        Room is kept for a reply, at most half of the context. Raises ConfigError for a turn without
        ids, and for one that the template refuses.
        """
        turns, context = [*self.turns, Message("user", text)], self.writer.generator.context
        room = context - min(self.writer.options.tokens, context // 2)
        ids: list[int] = []
        for skipped in range(0, len(turns), 2):
            whole = self.template.render([*self._system, *turns[skipped:]])
            ids = self.writer.tokenizer.encode(whole).tolist()
            if len(ids) <= room:
                break
        if not ids:
            raise ConfigError("the turn has no tokens")
        return Turn(turns, ids, skipped)

    def reply(self, turn: Turn, show: Show | None = None) -> str:
        """Return the reply to a turn, and remember both."""
        line = Line(self.writer, Prompt(turn.ids, self.writer.options.seed), 0, show)
        if self._rows is None or len(self._rows.texts) > 1:  # of a beam search
            self._rows = Rows(self.writer.generator, [turn.ids])
        else:
            self._rows.replace(turn.ids)
        self.num_forgotten = turn.skipped
        try:
            self.writer.advance(self._rows, [line])
        finally:
            self.turns = [*turn.turns, Message("assistant", line.text.strip())]
        self.full = line.full
        return line.text


if __name__ == "__main__":
    sys.exit(main())
