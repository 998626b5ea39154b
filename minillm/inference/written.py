"""Texts that a model writes for sources, and their scores against references, on any mesh.

The texts are dealt to the replicas in batches of similar lengths. Each replica counts the n-grams
of its own. The counts of all texts are added, and a formula turns the sums into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.record import option
from minillm.comm.communicator import Communicator
from minillm.data.sentence_pieces import marks_of
from minillm.data.tokenizers import Tokenizer
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Rule
from minillm.inference.forward import own_batches
from minillm.inference.translator import GREEDY, Translator
from minillm.metrics.options import ScoringOptions
from minillm.metrics.protocol import TextMetric, num_statistics, numbers_of, statistics_of
from minillm.training.assembly import Assembly


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


Write = Callable[[Sequence[str]], list[str]]
"""Writes a text for each source. Collective over the tp and pp axes of a replica."""


class TranslationWriter:
    """Translations of lines of text. `num_cut` counts sources that were longer than the context."""

    def __init__(self, model: Assembly, tokenizer: Tokenizer, rule: Rule, most: int | None) -> None:
        marks = marks_of(tokenizer)
        self.translator = Translator(model, marks.end, marks.start)
        self.tokenizer, self.rule, self.most, self.num_cut = tokenizer, rule, most, 0

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
        ids, most = self.tokenizer.encode(text), self.translator.context - 1
        self.num_cut += len(ids) > most
        return np.append(ids[:most], self.translator.end).astype(np.int64)


def score_rows(
    write: Write,
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
    mesh, rows = model.mesh, np.zeros((len(pairs), num_statistics(metrics)))
    first_of_replica = mesh.coord("tp") == mesh.coord("pp") == 0
    stride = batch * mesh.axis("dp").size
    with comm.working("writing texts"):
        for number, places in enumerate(own_batches([len(s) for s, _ in pairs], batch, model)):
            texts = write([pairs[i][0] for i in places])
            if first_of_replica:
                for i, text in zip(places, texts, strict=True):
                    rows[i] = statistics_of(metrics, text, [pairs[i][1]])
            advance(min(stride, len(pairs) - number * stride))
    comm.all_reduce_(rows, kind="control")
    return rows


def text_scores(metrics: Sequence[TextMetric], rows: np.ndarray) -> dict[str, Any]:
    """Return the number of texts, and their scores with intervals, as JSON values."""
    return {"texts": len(rows)} | numbers_of(metrics, rows)
