"""Chat: predict the answers of an assistant in dialogues, given all that stands before them.

    user: 2 + 2? | assistant: 4 <end> | user: and 3 + 3? | assistant: 6 <end>
                              ^^^^^^^                                 ^^^^^^^ of the loss

A dialogue is a row. Its text is that of the model's chat template, cut where answers begin and end,
and each piece is encoded alone, as in a chat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import Record, option
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator
from minillm.data.batches import IGNORE_INDEX
from minillm.data.buckets import padded, padded_length
from minillm.data.dialogues import Dialogue, errands, read_dialogues
from minillm.data.templates import Message, Template, chunks_of, template_of
from minillm.data.token_batches import TokenBatches
from minillm.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.example_order import ExampleOptions, ExampleOrder, Examples, parts_of, unchanged
from minillm.tasks.language_model import Evaluation

BUILT_IN = "errands"
Parts = list[tuple[str, list[Dialogue]]]
"""Dialogues to train on and those held out, each with the name of their source."""


class EncodedDialogues:
    """Rows of tokens and of targets, of which those of the answers count.

    Of a dialogue that is longer than `context` the beginning is kept; without an answer in there it
    is left out.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        tokenizer: Tokenizer,
        template: Template,
        ends: frozenset[int],
        context: int,
    ) -> None:
        self.tokens, self.targets = list[IntArray](), list[IntArray]()
        self.num_cut = self.num_left_out = 0
        self.first_cut = 0
        """Line of the first dialogue that was cut; 0 without one."""
        for dialogue in dialogues:
            ids, learnt = encoded(dialogue.messages, tokenizer, template, ends)
            if len(ids) > context + 1:
                self.num_cut += 1
                self.first_cut = self.first_cut or dialogue.line
            ids, learnt = ids[: context + 1], learnt[1 : context + 1]
            if not learnt.any():
                self.num_left_out += 1
                continue
            self.tokens.append(ids[:-1])
            self.targets.append(np.where(learnt, ids[1:], IGNORE_INDEX))
        self.lengths = np.array([len(row) for row in self.tokens], np.int64)  # [N]
        counts = [int((row != IGNORE_INDEX).sum()) for row in self.targets]
        self.counts = np.array(counts, np.int64)  # targets of each row [N]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(
        self, numbers: IntArray, most: int, where: Where, divisors: Mapping[str, float]
    ) -> Batch:
        """Return the dialogues [B], as long as the longest of them, at most `most`."""
        length = int(padded_length(int(self.lengths[numbers].max(initial=1)), most))
        arrays = {
            "tokens": padded([self.tokens[i] for i in numbers], length, 0),
            "targets": padded([self.targets[i] for i in numbers], length, IGNORE_INDEX),
        }
        upload = where.device.upload
        times = Where(where.step, where.samples, np.arange(length), device=where.device)
        # No query that counts sees the padding behind its row: attention is causal.
        return Batch({name: upload(array) for name, array in arrays.items()}, divisors, times)


def encoded(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, ends: frozenset[int]
) -> tuple[IntArray, np.ndarray]:
    """Return the ids of a dialogue up to its last answer [N], and if each is learnt, bool [N].

    An answer is learnt up to the first id of `ends`, which ends it.
    """
    ids, learnt = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for text, is_answer in chunks_of(template, messages):
        found = np.asarray(tokenizer.encode(text), np.int64) if text else ids[0][:0]
        marks = np.full(len(found), is_answer)
        stops = np.flatnonzero(np.isin(found, list(ends)))
        if is_answer and len(stops):
            marks[stops[0] + 1 :] = False
        ids.append(found)
        learnt.append(marks)
    return np.concatenate(ids), np.concatenate(learnt)


class Chatting(ExampleOrder):
    """Next-token prediction of answers: a mean over their tokens in a step, on all ranks."""

    losses: Sequence[str] = ("loss",)

    def __init__(self, dialogues: EncodedDialogues, *order: Any) -> None:
        """Take the dialogues, and what `ExampleOrder` takes behind their lengths."""
        super().__init__(dialogues.lengths, *order)
        self.dialogues = dialogues

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the dialogues `rows` [B] of a step, divided by the answers of the whole step."""
        numbers, where = self.rows(step), Where(step, rows, device=device)
        divisors = {"loss": float(self.dialogues.counts[numbers].sum())}
        return self.dialogues.batch(numbers[rows], self.context, where, divisors)


class HeldOutDialogues:
    """Cross-entropy over the answers of the dialogues that the first `tokens` tokens fill."""

    sums: Sequence[str] = ("loss",)

    def __init__(self, dialogues: EncodedDialogues, context: int, tokens: int | None) -> None:
        self.dialogues, self.context = dialogues, context
        ends = np.cumsum(dialogues.counts)  # targets up to each dialogue
        within = int(np.searchsorted(ends, tokens, "right")) if tokens else len(ends)
        self.num_rows = max(1, within)
        self.lengths = dialogues.lengths[: self.num_rows]
        self.num_tokens = int(ends[self.num_rows - 1])

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the dialogues `rows` [B]."""
        where = Where(0, rows, device=device)
        return self.dialogues.batch(rows, self.context, where, {"loss": 1.0})

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return nothing: the loss is all that is needed."""
        return {}

    def result(self, sums: Mapping[str, float]) -> Evaluation:
        """Return loss and perplexity."""
        return Evaluation.of(sums["loss"] / self.num_tokens, self.num_tokens, None)


class Dialogues(Examples):
    """Dialogues to learn and dialogues held out, encoded: a `Deciding` dataset."""

    def __init__(
        self, parts: Parts, vocabulary: Mapping[str, Any], options: ChatOptions, context: int
    ) -> None:
        """Raise ConfigError if no answer fits the context, or one is cut that must not be."""
        self.source, self.options = parts[0][0], options
        self.tokenizer = tokenizer_from_json(vocabulary)
        self.vocab_size = self.tokenizer.vocab_size
        self.template = template_of(vocabulary, options.template)
        self.stops = self.template.stops
        own = parts if options.dev is None else parts[:1]  # a resumed run may have another --dev
        content = [[each.messages for each in part] for _, part in own]
        self.sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
        more = (self.tokenizer, self.template, frozenset(vocabulary.get("ends") or ()), context)
        self.train, self.held_out = (EncodedDialogues(part, *more) for _, part in parts)
        for (name, part), rows in zip(parts, (self.train, self.held_out), strict=True):
            if rows.num_cut and not options.truncate:
                raise ConfigError(
                    f"line {rows.first_cut} of {name} has more than --context {context} tokens; "
                    "use a larger one, or leave --no-truncate out"
                )
            if part and not len(rows):
                raise ConfigError(
                    f"no answer of {name} begins within --context {context} tokens; use a larger "
                    "one"
                )
        self.num_held_out = int(self.held_out.counts.sum())

    def decides(self, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return the steps of the epochs that were asked for."""
        return self.options.steps(len(self.train), batch)

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer and the name of the template as a JSON value."""
        return self.tokenizer.to_json() | {"template": self.template.name}

    def describe(self) -> str:
        """Return one line for the plan."""
        cut, out = (
            getattr(self.train, name) + getattr(self.held_out, name)
            for name in ("num_cut", "num_left_out")
        )
        words = f", {plural(cut, 'dialogue')} cut to --context" if cut else ""
        words += f", {out} of them left out without an answer" if out else ""
        counted = self.train.counts.sum() / self.train.lengths.sum() if len(self.train) else 0.0
        return (
            f"{self.source}: {len(self.train):,} dialogues to train on, {len(self.held_out):,} "
            f"held out{words}; answers are {counted:.0%} of the tokens; template "
            f"{self.template.name}, {self.tokenizer.name} vocabulary of {self.vocab_size:,}, "
            f"sha256 {self.sha256[:12]}"
        )

    def task(
        self, shape: Shape, *, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> Chatting:
        """Return the training dialogues, in buckets unless their order is kept."""
        return Chatting(self.train, shape.context, batch, seed, first, self.options.shuffle)

    def measure(self, shape: Shape, tokens: int | None) -> HeldOutDialogues:
        """Return the measure over the answers that the first `tokens` targets fill."""
        return HeldOutDialogues(self.held_out, shape.context, tokens)

    def prompt(self) -> Sequence[int]:
        """Return the ids of a dialogue up to where its first answer begins."""
        rows = self.held_out if len(self.held_out) else self.train
        begins = int(np.flatnonzero(rows.targets[0] != IGNORE_INDEX)[0])
        found: list[int] = rows.tokens[0][: begins + 1].tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ExampleOptions):
    """Dialogues, as in `--train train.jsonl --dev dev.jsonl` (docs/tasks.md)."""

    train: str | None = option(None, announced=True, path=True)
    """Dialogues: JSON lines with prompt and completion, or with messages of a role and a content,
    also .gz; left out: generated errands, which ask for the first, the last or the number of some
    animals."""
    dev: str | None = option(None, resumable=True, path=True)
    """Held-out dialogues; left out: one of 10 of --train, at most 1,000."""
    tokenizer: str = option("byte", path=True)
    """Tokens of a model from scratch: byte, char, bpe:SIZE (learnt from the dialogues), or the path
    of a tokenizer.json, or a folder with one."""
    template: Literal["auto", "chatml", "plain", "tldr"] = "auto"
    """Text around turns: that of the model's files (auto), <|im_start|> and <|im_end|> (chatml),
    the words User and Assistant (plain), or TL;DR: before a summary of one line (tldr)."""


@dataclass(frozen=True, kw_only=True)
class DialoguesToMeasure(Record):
    """Dialogues to measure on, as in `--data test.jsonl`."""

    data: str | None = option(None, path=True)
    """Dialogues, JSON lines as in training; left out: those held out in training."""


class ChatObjective:
    """Objective "chat": the answers in dialogues."""

    name = "chat"
    options, measured = ChatOptions, DialoguesToMeasure

    def load(
        self,
        options: ChatOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> Dialogues:
        """Load the dialogues for a model of the options `shape`. Collective.

        The first rank reads and learns the tokenizer.
        """

        def read() -> list[Any]:
            parts = parts_of(options, BUILT_IN, errands, read_dialogues)
            if vocabulary is not None:
                return [parts, vocabulary]
            template = template_of({}, options.template)
            texts = (
                template.render(each.messages, reply=False) for _, part in parts for each in part
            )
            return [parts, make_tokenizer(options.tokenizer, texts).to_json()]

        parts, known = from_first(comm, read, ConfigError)
        return _dialogues(parts, known, options, shape.context)

    def held_out(
        self,
        asked: DialoguesToMeasure,
        trained: ChatOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> Dialogues:
        """Load the dialogues to measure. Collective."""
        if asked.data is None:
            return unchanged(self.load(trained, shape, vocabulary, comm), sha256, "dialogue")
        name = asked.data
        found = from_first(comm, lambda: read_dialogues(name), ConfigError)
        return _dialogues([(name, []), (name, found)], vocabulary, trained, shape.context)


def _dialogues(
    parts: Any, vocabulary: Mapping[str, Any], options: ChatOptions, context: int
) -> Dialogues:
    """Return the dataset of parts that came as JSON from the first rank."""
    made = [
        (name, [Dialogue(tuple(Message(*each) for each in m), line) for m, line in part])
        for name, part in parts
    ]
    return Dialogues(made, vocabulary, options, context)


OBJECTIVE = ChatObjective()
