"""Documents of a text: special tokens, sentences, and pairs of segments for an encoder.

A document is a file, a line of a .jsonl file, a row of a .parquet file, or a block between blank
lines of one. Its sentences end at line ends, and behind . ! ? before a blank. Tokens of a text hold
[SEP] behind each sentence and [CLS] behind each document, so a text is cut before it is tokenized,
whatever its tokenizer does with blanks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minillm.base import rng
from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.tokenizers.model import Spans
from minillm.tokenizers.pieces import checked, token_dtype

if TYPE_CHECKING:
    from minillm.data.tokenizers import Tokenizer

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+")
NAMES = (("[PAD]", "<pad>"), ("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[MASK]", "<mask>"))


class Specials(NamedTuple):
    """Ids of the special tokens."""

    pad: int
    cls: int
    sep: int
    mask: int


class SpecialTokenizer:
    """Tokenizer `base` with the special tokens of an encoder, which get ids behind its own.

    A base that has [PAD], [CLS], [SEP] and [MASK], or RoBERTa's names for them, keeps its ids. With
    `documents`, ids hold [SEP] behind each sentence and [CLS] behind each document.
    """

    def __init__(self, base: Tokenizer, documents: bool) -> None:
        self.base, self.documents, self.name = base, documents, base.name
        find, ids, size = getattr(base, "token_id", lambda token: None), [], base.vocab_size
        for names in NAMES:
            own = [found for name in names if (found := find(name)) is not None]
            ids.append(own[0] if own else size)
            size += not own
        self.specials, self.vocab_size = Specials(*ids), size

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`."""
        return self.encode_pieces([text])[0]

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each piece."""
        dtype = token_dtype(self.vocab_size)
        if not self.documents:
            return [ids.astype(dtype, copy=False) for ids in self.base.encode_pieces(pieces)]
        return [self._marked(piece, dtype) for piece in pieces]

    def _marked(self, piece: str, dtype: np.dtype) -> np.ndarray:
        """Return the ids of the sentences of a piece, each with its mark."""
        lines = [line.strip() for line in piece.splitlines()]
        cut = [SENTENCE_END.split(line) if line else [] for line in lines]
        ids = iter(self.base.encode_pieces([sentence for line in cut for sentence in line]))
        sep, cls = (np.array([mark], dtype) for mark in (self.specials.sep, self.specials.cls))
        parts = [np.empty(0, dtype)]
        for line in cut:
            for _ in line:
                parts += [next(ids).astype(dtype, copy=False), sep]
            if not line:
                parts.append(cls)
        return np.concatenate(parts)

    def spans(self, text: str) -> Spans:
        """Return the ids of `text`, without marks, and the characters that each stands for.

        Raises ConfigError if the tokenizer does not know them.
        """
        find = getattr(self.base, "spans", None)
        if find is None:
            raise ConfigError(
                f"the tokenizer {self.name} does not say which characters its tokens stand for, "
                "which spans of a text need; use wordpiece:SIZE, bpe:SIZE, char or byte"
            )
        found: Spans = find(text)
        return found

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each piece; the bytes of each id are not known."""
        return [(ids, np.zeros(len(ids), np.uint8)) for ids in self.encode_pieces(pieces)]

    def decode(self, ids: Any) -> str:
        """Return the text, special tokens by name."""
        found, known = (
            checked(ids, self),
            {id_: n for id_, (n, _) in zip(self.specials, NAMES, strict=True)},
        )
        marks = [i for i, id_ in enumerate(found.tolist()) if id_ in known]
        parts, start = [], 0
        for end in [*marks, len(found)]:
            parts.append(self.base.decode(found[start:end]) if end > start else "")
            parts.append(known[int(found[end])] if end < len(found) else "")
            start = end + 1
        return "".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `tokenizer_from_json` builds an equal tokenizer."""
        return {"kind": "special", "base": self.base.to_json(), "documents": self.documents}

    def drawable(self) -> IntArray:
        """Return the ids that are no special token, int64."""
        return np.setdiff1d(np.arange(self.base.vocab_size), self.specials)

    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Return which ids can go on with a word, and which such an id can follow: bool [V] each.

        ## marks the rest of a word in a WordPiece vocabulary. Elsewhere letters and digits that
        follow one another are a word; a token with a blank before them begins one.
        """
        base, size = self.base, self.base.vocab_size
        find = getattr(base, "token", None)
        texts = [find(i) if find else base.decode([i]) for i in range(size)]
        if any(text.startswith("##") for text in texts):
            rest = [text.startswith("##") for text in texts]
            return _flags(rest, self), _flags([True] * size, self)
        texts = [base.decode([i]) for i in range(size)]
        inner, open_ = (
            [bool(text) and (text[at].isalnum() or text[at] == "�") for text in texts]
            for at in (0, -1)
        )
        return _flags(inner, self), _flags(open_, self)


def special_json(value: Mapping[str, Any], documents: bool) -> dict[str, Any]:
    """Return the value of a `SpecialTokenizer` over the tokenizer `value`, or over its base."""
    base = value["base"] if value.get("kind") == "special" else value
    return {"kind": "special", "base": base, "documents": documents}


def _flags(values: Sequence[bool], tokenizer: SpecialTokenizer) -> np.ndarray:
    flags = np.zeros(tokenizer.vocab_size, bool)
    flags[: len(values)] = values
    flags[list(tokenizer.specials)] = False
    return flags


class Pair(NamedTuple):
    """Two segments of a text."""

    first: IntArray  # ids, int64
    second: IntArray
    unrelated: bool  # the second one is from another document; else it follows


class Documents:
    """Sentences of marked `tokens` [N] (`SpecialTokenizer`) by documents.

    A sequence is a function of the seed and its number. An epoch begins a pair at every sentence
    that another one of its document follows, in random order. The first segment takes some of the
    sentences that fit. The second one takes the rest, or in half of all cases sentences from
    another document (Devlin et al. 2019, 3.1).
    """

    def __init__(self, tokens: np.ndarray, specials: Specials, source: str) -> None:
        """Raise ConfigError unless there are two documents, and a sentence that follows another."""
        self.tokens, self.specials = tokens, specials
        marks = np.flatnonzero((tokens == specials.sep) | (tokens == specials.cls))
        self.starts = np.concatenate([np.zeros(1, np.int64), marks + 1])
        self.ends = np.append(marks, len(tokens))
        document = np.cumsum(np.append(0, tokens[marks] == specials.cls))
        real = self.ends > self.starts
        self.starts, self.ends, document = self.starts[real], self.ends[real], document[real]
        _, self.firsts, self.document = np.unique(document, return_index=True, return_inverse=True)
        """First sentence of each document [D], and the document of each sentence [S]."""
        self.lasts = np.append(self.firsts[1:], len(document))
        self.before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.ends - self.starts)])
        """Tokens of all sentences before each one [S + 1]."""
        self.anchors = np.flatnonzero(self.document[1:] == self.document[:-1])
        """Sentences that another one of the same document follows."""
        if len(self.firsts) < 2 or not len(self.anchors):
            number, most = len(self.firsts), int((self.lasts - self.firsts).max(initial=0))
            raise ConfigError(
                "pairs of segments need two documents, which are files or blocks between blank "
                f"lines, and one of at least two sentences; {source} has {number} with at most "
                f"{most}; put blank lines between its documents and a sentence on each line, or "
                "use --objective mlm"
            )

    def pair(self, seed: int, number: int, room: int) -> Pair:
        """Return the pair `number` of a run, at most `room` tokens."""
        epoch, index = divmod(number, len(self.anchors))
        at = rng.permute(rng.key(seed, "data", "order", epoch), len(self.anchors), index)
        start = int(self.anchors[at[0]])
        key = rng.key(seed, "data", "pair", epoch, index)
        drawn = rng.uniform(key, (6,), (slice(0, 6),), np.dtype(np.float64)).tolist()
        own = int(self.document[start])
        end = max(self._end(start, room), start + 2)
        cut = start + 1 + int(drawn[0] * (end - start - 1))
        first, unrelated = self._ids(start, cut), drawn[1] < 0.5
        if unrelated:
            other = (own + 1 + int(drawn[2] * (len(self.firsts) - 1))) % len(self.firsts)
            begin, stop = int(self.firsts[other]), int(self.lasts[other])
            begin += int(drawn[3] * (stop - begin))
            second = self._ids(begin, max(self._end(begin, room - len(first)), begin + 1))
        else:
            second = self._ids(cut, end)
        kept = fitting(len(first), len(second), room)
        first, second = (
            ids[len(ids) - size :] if coin < 0.5 else ids[:size]
            for ids, size, coin in zip((first, second), kept, drawn[4:], strict=True)
        )
        return Pair(first, second, unrelated)

    def _end(self, start: int, room: int) -> int:
        """Return the end of the sentences from `start` that fill `room`, or of their document."""
        end = int(np.searchsorted(self.before, self.before[start] + room))
        return min(end, int(self.lasts[self.document[start]]))

    def _ids(self, start: int, end: int) -> IntArray:
        """Return the ids of the sentences [start, end)."""
        ids = self.tokens[self.starts[start] : self.ends[end - 1]].astype(np.int64)
        return ids[ids != self.specials.sep]


def fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the sizes of two segments after the longer one has lost tokens until both fit."""
    first, second = (
        min(first, max(room - second, -(-room // 2))),
        min(second, max(room - first, room // 2)),
    )
    return first, second
