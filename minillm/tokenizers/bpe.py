"""Byte-level byte-pair encoding (Radford et al. 2019): any text has ids, and decodes to itself.

Words are UTF-8 bytes; adjacent pairs merge in the order in which training has found them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.errors import ConfigError
from minillm.tokenizers.byte_level import Cutter, byte_characters
from minillm.tokenizers.model import Model, Remembered, Spans
from minillm.tokenizers.normalize import Normalizer
from minillm.tokenizers.unsupported import require

PLAIN = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


class BPE(Model, Remembered[tuple[int, ...]]):
    """Byte-level BPE of a tokenizer.json, of GPT-2, Llama 3, Qwen 2, SmolLM2 and others."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """Raise Unsupported for other kinds, ConfigError for merges outside the vocabulary."""
        super().__init__()
        model = definition["model"]
        for name in PLAIN:
            require(not model.get(name), f"{name} {model.get(name)!r}")
        decoder = (definition.get("decoder") or {}).get("type")
        require(decoder == "ByteLevel", f"the decoder {decoder}")
        self._normalize = Normalizer(definition.get("normalizer"))
        self._cut = Cutter(definition.get("pre_tokenizer"))
        self.vocab = model["vocab"]
        self._whole = bool(model.get("ignore_merges"))
        characters = byte_characters()
        self._byte_of = {character: byte for byte, character in enumerate(characters)}
        self._id_of_byte = np.array([self.vocab.get(c, -1) for c in characters], np.int64)
        self._every_byte = bool((self._id_of_byte >= 0).all())
        self._pairs, self._ranks, self._merged = self._table(model["merges"])
        size = max(self.vocab.values(), default=-1) + 1
        self._lengths = np.zeros(size, np.int64)  # bytes of each token
        self._lengths[list(self.vocab.values())] = [len(token) for token in self.vocab]

    def _table(self, merges: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs, ranks and merged ids that `kernels.merge_pairs` takes."""
        ranks: dict[int, int] = {}
        merged = []
        for rank, merge in enumerate(merges):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            try:
                ranks[(self.vocab[left] << 32) + self.vocab[right]] = rank
                merged.append(self.vocab[left + right])
            except KeyError as error:
                raise ConfigError(
                    f"merge {rank} of {left!r} and {right!r} needs the token {error.args[0]!r}, "
                    "which its vocabulary lacks"
                ) from None
        pairs = np.fromiter(ranks, np.uint64, len(ranks))
        order = np.argsort(pairs)
        return (
            pairs[order],
            np.fromiter(ranks.values(), np.uint32, len(ranks))[order],
            np.array(merged, np.uint32),
        )

    def compute(self, words: list[str]) -> list[tuple[int, ...]]:
        """Return the ids of each word."""
        encoded = [word.encode() for word in words]
        ids = self._id_of_byte[np.frombuffer(b"".join(encoded), np.uint8)]
        ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
        if not self._every_byte:  # a byte without a token is dropped before anything merges
            ends = np.concatenate([[0], np.cumsum(ids >= 0)])[ends]
            ids = ids[ids >= 0]
        new, ends = kernels.merge_pairs(
            ids.astype(np.uint32), ends, self._pairs, self._ranks, self._merged
        )
        flat, stops = new.tolist(), ends.tolist()
        found = [tuple(flat[a:b]) for a, b in zip([0, *stops[:-1]], stops, strict=True)]
        if not self._whole:
            return found
        return [self._as_one(word, ids) for word, ids in zip(words, found, strict=True)]

    def _as_one(self, word: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the id of a word that is a token itself, which merges might not reach."""
        if len(ids) < 2:
            return ids
        characters = byte_characters()
        token = "".join(characters[byte] for byte in word.encode())
        return (self.vocab[token],) if token in self.vocab else ids

    def _prefixed(self, text: str) -> str:
        return self._cut.prefix + text if text and not text.startswith(" ") else text

    def ids(self, text: str) -> Iterable[int]:
        """Return the ids of a text."""
        words = self._cut(self._prefixed(self._normalize(text)))
        return itertools.chain.from_iterable(self.of(words))

    def spans(self, text: str) -> Spans:
        """Return the ids of a text and their places.

        A token that holds a part of a character stands for the whole of it.
        """
        changed, starts, ends = self._normalize.aligned(text)
        prefixed = self._prefixed(changed)
        added = len(prefixed) - len(changed)
        ids = np.fromiter(itertools.chain.from_iterable(self.of(self._cut(prefixed))), np.int64)
        data = np.frombuffer(prefixed.encode(), np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1 - added  # of each byte
        if not self._every_byte:
            character = character[self._id_of_byte[data] >= 0]
        after = np.cumsum(self._lengths[ids])
        first = np.maximum(character[after - self._lengths[ids]], 0)
        stop = np.maximum(character[after - 1], 0)
        return Spans(ids, starts[first], ends[stop])

    def decode(self, tokens: Sequence[str]) -> str:
        """Return the text; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        byte_of = self._byte_of
        parts = []
        for token in tokens:
            try:
                parts.append(bytes([byte_of[character] for character in token]))
            except KeyError:
                parts.append(token.encode())
        return b"".join(parts).decode("utf-8", errors="replace")
