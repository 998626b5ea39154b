"""Texts that a model writes for sources, and their scores against references, on any mesh.

The texts are dealt to the replicas in batches of similar lengths. Each replica counts the n-grams
of its own. The counts of all texts are added, and a formula turns the sums into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import flag, option
from minillm.comm.communicator import MAX, Communicator
from minillm.data.sentence_pieces import marks_of
from minillm.data.tokenizers import Tokenizer, tokenizer_from_json
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Rule
from minillm.inference.engine import Generator
from minillm.inference.forward import own_batches
from minillm.inference.loading import Opened
from minillm.inference.rows import Rows
from minillm.inference.text import end_ids, prompt_ids
from minillm.inference.translator import GREEDY, Translator
from minillm.inference.writing import Line, Prompt, Writer, WritingOptions
from minillm.metrics.options import ScoringOptions
from minillm.metrics.protocol import TextMetric, num_statistics, numbers_of, statistics_of
from minillm.tasks.protocol import Written
from minillm.training.assembly import Assembly
from minillm.training.held_out import Stopped


@dataclass(frozen=True, kw_only=True)
class TextOptions(BeamOptions, ScoringOptions):
    """Texts that the model writes, and their scores."""

    most_tokens: int | None = option(None, at_least=1)
    """Most tokens of a text; left out: as many as the context holds."""
    batch: int = option(32, at_least=1)
    """Texts that each replica writes at once."""

    @property
    def rule(self) -> Rule:
        """Rule that chooses the tokens: a beam search, or the likeliest token after token."""
        return Beam(self) if self.beam > 1 else GREEDY

    def settings(self) -> dict[str, Any]:
        """Return how texts are chosen, as JSON values: a score without it compares to nothing."""
        search = ("length_penalty", "alpha", "early_stopping") if self.beam > 1 else ()
        return {name: getattr(self, name) for name in ("beam", *search)}


@dataclass(frozen=True, kw_only=True)
class SummaryOptions(TextOptions):
    """Texts that the model writes behind sources, and their scores (docs/tasks.md)."""

    source: str | None = option(None, path=True)
    """File with a source on each line, plain or .gz, to score what the model writes behind it."""
    target: str | None = option(None, path=True)
    """File with the reference of each line of --source."""
    separator: str = option(" TL;DR:", verbatim=True)
    """Text between a source and what the model writes, up to the end of the line."""

    metric: Literal["bleu", "rouge", "none"] = "rouge"
    """Scores of texts: ROUGE-1, ROUGE-2 and ROUGE-L (rouge), BLEU and chrF (bleu), or none."""

    def __post_init__(self) -> None:
        """Raise ConfigError for one file without the other, and for options without files."""
        super().__post_init__()
        if (self.source is None) != (self.target is None):
            given, missing = ("source", "target") if self.source else ("target", "source")
            raise ConfigError(f"--{given} has no counterpart; pass --{missing} with the other side")
        if self.source is not None and self.metric == "none":
            raise ConfigError("--metric none scores nothing; use rouge or bleu")
        changed = [
            name for name in self.options() if getattr(self, name) != getattr(type(self), name)
        ]
        if self.source is None and changed:
            raise ConfigError(
                f"{flag(changed[0])} is about texts that the model writes; name their sources and "
                "references with --source and --target"
            )


class Writes(Protocol):
    """Way to write a text for each source. Collective over the tp and pp axes of a replica."""

    context: int  # tokens of a source and what belongs to it
    num_cut: int  # sources so far that were too long, of which the first tokens were read

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Return a text for each source, without line ends."""


class TranslationWriter:
    """Translations of lines of text."""

    def __init__(self, model: Assembly, tokenizer: Tokenizer, rule: Rule, most: int | None) -> None:
        marks = marks_of(tokenizer)
        self.translator = Translator(model, marks.end, marks.start)
        self.context, self.num_cut = self.translator.context, 0
        self.tokenizer, self.rule, self.most = tokenizer, rule, most

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Return the translations. A source that is too long is read up to its last token."""
        return self.of_ids([self._ids(each) for each in sources])

    def of_ids(self, sources: Sequence[IntArray]) -> list[str]:
        """Return the translations of ids that each have an end. An empty source stays empty."""
        full = [ids for ids in sources if len(ids) > 1]
        found = iter(self.translator.translate(full, self.most, self.rule) if full else [])
        texts = (self.tokenizer.decode(next(found)) if len(ids) > 1 else "" for ids in sources)
        return [text.replace("\n", " ") for text in texts]

    def _ids(self, text: str) -> IntArray:
        ids, most = self.tokenizer.encode(text), self.context - 1
        self.num_cut += len(ids) > most
        return np.append(ids[:most], self.translator.end).astype(np.int64)


class SummaryWriter:
    """Lines that a decoder writes behind sources and a separator, such as "TL;DR:".

    Radford et al. 2019, section 3.6. A source that leaves no room is cut at its end.
    """

    def __init__(
        self,
        model: Assembly,
        tokenizer: Tokenizer,
        options: SummaryOptions,
        ends: Collection[int] = (),
    ) -> None:
        most = options.most_tokens
        self.context = Generator(model).context
        room = self.context // 4 if most is None else most
        asked: dict[str, Any] = {name: getattr(options, name) for name in BeamOptions.options()}
        asked |= {"tokens": room, "stop": ("\n",)}
        asked |= {"temperature": 0.0} if options.beam == 1 else {}
        self.writer = Writer(model, tokenizer, WritingOptions(**asked), ends)
        self.separator, self._encode, self.num_cut = options.separator, tokenizer.encode, 0
        self._most = self.context - room - len(self._encode(options.separator))
        if self._most < 1:
            raise ConfigError(
                f"the context of {self.context} tokens has no room for a source, the separator "
                f"{options.separator!r} and {room} tokens; use a smaller --most-tokens"
            )

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Return the line behind each source."""
        lines = [Line(self.writer, Prompt(self._ids(each), 0)) for each in sources]
        self.writer.advance(Rows(self.writer.generator, [line.prompt.ids for line in lines]), lines)
        return [line.text.strip() for line in lines]

    def _ids(self, source: str) -> list[int]:
        ids = self._encode(source).tolist()
        if len(ids) <= self._most:
            return prompt_ids(self.writer.tokenizer, source + self.separator)
        self.num_cut += 1
        return [*ids[: self._most], *self._encode(self.separator).tolist()]


def make_writer(opened: Opened, model: Assembly, options: TextOptions) -> Writes:
    """Return the writer of a trained model. Raises ConfigError for options that leave no room."""
    if isinstance(options, SummaryOptions):
        return SummaryWriter(model, opened.tokenizer, options, end_ids(opened.vocabulary))
    return TranslationWriter(model, marked_tokenizer(opened), options.rule, options.most_tokens)


def marked_tokenizer(opened: Opened) -> Tokenizer:
    """Return the tokenizer. Raises ConfigError if the model has no id for the ends of texts."""
    found = opened.tokenizer
    if marks_of(found).vocab > opened.vocab:
        raise ConfigError(
            f"{opened.path} has {opened.vocab} tokens, all of them of its tokenizer, and none that "
            "begins and ends translations"
        )
    return found


# What a family writes -> the default options of its texts.
OPTIONS: Mapping[str | None, TextOptions] = {
    "translation": TextOptions(),
    "text": SummaryOptions(),
}


def score_rows(
    write: Writes,
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[TextMetric],
    batch: int,
    model: Assembly,
    comm: Communicator,
    advance: Callable[[int], Any] = lambda number: None,
) -> np.ndarray:
    """Return the statistics [N, W] of the texts for `pairs` of source and reference, on every rank.

    Each replica writes `batch` of them at once. `advance` is called with the number of texts
    written, of all replicas. Collective over `comm`, all ranks.
    """
    mesh = model.mesh
    batches = own_batches([len(source) for source, _ in pairs], batch, model)
    stride = batch * mesh.axis("dp").size
    with comm.working("writing texts"):
        rows = own_rows(
            write, pairs, metrics, batches, lambda i: advance(min(stride, len(pairs) - i * stride))
        )
    if mesh.coord("tp") or mesh.coord("pp"):
        rows[...] = 0  # the same as those of the first rank of the replica
    comm.all_reduce_(rows, kind="control")
    return rows


def own_rows(
    write: Writes,
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[TextMetric],
    batches: Sequence[Sequence[int]],
    ended: Callable[[int], Any],
) -> np.ndarray:
    """Return the statistics [N, W] of the texts in `batches`, numbers of pairs; zeros for others.

    `ended` is called with the number of each batch, from 0. Collective over tp and pp of a replica.
    """
    rows = np.zeros((len(pairs), num_statistics(metrics)))
    for number, places in enumerate(batches):
        texts = write([pairs[i][0] for i in places])
        for i, text in zip(places, texts, strict=True):
            rows[i] = statistics_of(metrics, text, [pairs[i][1]])
        ended(number)
    return rows


def text_scores(metrics: Sequence[TextMetric], rows: np.ndarray) -> dict[str, Any]:
    """Return the number of texts, and their scores with intervals, as JSON values."""
    return {"texts": len(rows)} | numbers_of(metrics, rows)


def held_out_scores(
    model: Assembly,
    data: Written,
    replica: Communicator,
    stop: Callable[[], bool],
    beat: Callable[[], Any],
) -> str | None:
    """Return BLEU and chrF of the first held-out texts in words, None once a stop is asked.

    The texts are translated greedily. `beat` is called after each batch. Collective over the ranks
    of one `replica` of the model.
    """
    options, pairs = TextOptions(), data.references(None)[: data.num_scored]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    batches = [order[i : i + options.batch] for i in range(0, len(order), options.batch)]

    def ended(number: int) -> None:
        beat()
        if replica.reduce_numbers([stop()], MAX)[0]:
            raise Stopped

    write = TranslationWriter(model, tokenizer_from_json(data.vocabulary()), options.rule, None)
    with suppress(Stopped):
        found = text_scores(
            options.metrics(), own_rows(write, pairs, options.metrics(), batches, ended)
        )
        scores = (
            f"{label} {found[name]:.2f} ({low:.2f} to {high:.2f} with 95 %)"
            for label, name in (("BLEU", "bleu"), ("chrF", "chrf"))
            for low, high in (found[f"{name}_95"],)
        )
        count = plural(len(pairs), "held-out text")
        return f"{', '.join(scores)}, {count} translated greedily, {found['bleu_signature']}"
    return None
