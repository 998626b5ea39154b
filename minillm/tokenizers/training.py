"""Training of byte-level BPE and WordPiece vocabularies from the counts of words.

Both merge the most frequent pair of adjacent tokens until the vocabulary is full. Of pairs that are
equally frequent, the one with the lower ids is merged, so that a vocabulary follows from the counts
alone. WordPiece marks the tokens inside a word by ##; as in the package `tokenizers`, its score is
the frequency, not the likelihood ratio of Schuster and Nakajima (2012).
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.tokenizers import byte_level
from minillm.tokenizers.files import added_token, wordpiece_definition
from minillm.tokenizers.unicode import level_of
from minillm.tokenizers.wordpiece import Rules, words_of

INSIDE = "##"  # before a token that does not begin a word
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Advance = Callable[[int], Any]


class Wish(NamedTuple):
    """Vocabulary to train."""

    size: int
    special: tuple[str, ...] = ()  # tokens before all others
    lowercase: bool = False  # WordPiece: lower letters and strip accents
    alphabet: int | None = None  # WordPiece: most characters, the most frequent ones


class Kind(NamedTuple):
    """Kind of vocabulary: how it counts a text, and how it makes a tokenizer.json of the counts."""

    words: Callable[[str, Wish], Iterable[str]]
    train: Callable[[Mapping[str, int], Wish, Advance], dict[str, Any]]


def learn_merges(
    words: Sequence[list[int]],
    counts: Sequence[int],
    tokens: list[str],
    size: int,
    joined: Callable[[str, str], str],
    advance: Advance,
) -> list[tuple[str, str]]:
    """Merge pairs until there are `size` tokens or no pair is left; return the pairs in order.

    words: the ids of each word, which become those of its last tokens
    counts: how often each word occurs; tokens: that of each id, to which new ones are appended
    `joined` returns the token of two.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    totals: defaultdict[tuple[int, int], int] = defaultdict(int)
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for number, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in itertools.pairwise(word):
            totals[pair] += count
            places[pair].add(number)
    heap: list[tuple[int, tuple[int, int], int, set[int]]] = []
    pushed = 0  # makes entries of one pair comparable

    def push(found: Mapping[tuple[int, int], set[int]]) -> None:
        nonlocal pushed
        for pair, where in found.items():
            if totals[pair] > 0:
                pushed += 1
                heapq.heappush(heap, (-totals[pair], pair, pushed, where))

    push(places)
    merges = []
    while heap and len(tokens) < size:
        negative, pair, _, where = heapq.heappop(heap)
        if totals[pair] != -negative:  # other merges have taken some of its places
            push({pair: where})
            continue
        left, right = tokens[pair[0]], tokens[pair[1]]
        token = joined(left, right)
        new = ids.setdefault(token, len(tokens))
        if new == len(tokens):
            tokens.append(token)
            advance(1)
        merges.append((left, right))
        push(_merge(words, counts, where, pair, new, totals))
    return merges


def _merge(
    words: Sequence[list[int]],
    counts: Sequence[int],
    where: Iterable[int],
    pair: tuple[int, int],
    new: int,
    totals: defaultdict[tuple[int, int], int],
) -> Mapping[tuple[int, int], set[int]]:
    """Replace a pair by the id `new` in some words, and update the totals of its neighbours.

    Returns the pairs that have become possible, and the words that hold them.
    """
    left, right = pair
    found: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for number in where:
        word, count, at = words[number], counts[number], 0
        while at < len(word) - 1:
            if word[at] == left and word[at + 1] == right:
                word[at : at + 2] = [new]
                if at > 0:
                    before = word[at - 1]
                    totals[before, left] -= count
                    totals[before, new] += count
                    found[before, new].add(number)
                if at < len(word) - 1:
                    after = word[at + 1]
                    totals[right, after] -= count
                    totals[new, after] += count
                    found[new, after].add(number)
            at += 1
    return found


def _byte_words(text: str, wish: Wish) -> Iterable[str]:
    return _GPT2(text)


_GPT2 = byte_level.Cutter(byte_level.pre_tokenizer())


def _train_bpe(counts: Mapping[str, int], wish: Wish, advance: Advance) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE for counted words."""
    characters = byte_level.byte_characters()
    special = _distinct(wish.special, characters)
    tokens = [*special, *sorted(characters)]
    _check_room(len(tokens), wish.size, f"{len(special)} special tokens and 256 bytes")
    ids = {token: number for number, token in enumerate(tokens)}
    of_byte = [ids[character] for character in characters]
    order = sorted(counts)
    words = [[of_byte[byte] for byte in word.encode()] for word in order]
    merges = learn_merges(
        words, [counts[word] for word in order], tokens, wish.size, str.__add__, advance
    )
    vocab = {token: number for number, token in enumerate(tokens)}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    }
    found = byte_level.definition_of(model, byte_level.pre_tokenizer())
    return found | {"added_tokens": [added_token(vocab[token], token) for token in special]}


def _bert_words(text: str, wish: Wish) -> Iterable[str]:
    rules = Rules(True, True, wish.lowercase, wish.lowercase)
    found: list[str] = words_of(rules, level_of(text)).findall(text)
    return found


def _train_wordpiece(counts: Mapping[str, int], wish: Wish, advance: Advance) -> dict[str, Any]:
    """Return the tokenizer.json of a WordPiece vocabulary for counted words."""
    rules = Rules(True, True, wish.lowercase, wish.lowercase)
    normal: Counter[str] = Counter()
    for word, count in counts.items():
        normal[rules.normalized(word)] += count
    del normal[""]
    seen: Counter[str] = Counter()
    for word, count in normal.items():
        for character in word:
            seen[character] += count
    kept = sorted(sorted(seen), key=seen.__getitem__, reverse=True)[: wish.alphabet]
    # The package numbers characters inside words as it meets them in random order of the words.
    # This order is the most probable one: it decides between pairs of equal frequency.
    held_by = Counter(character for word in normal for character in word[1:])
    inside = sorted(held_by.keys() & set(kept), key=lambda c: (-held_by[c], c))
    special = _distinct((*BERT_SPECIAL, *wish.special), ())
    tokens = [*special, *sorted(kept), *(INSIDE + c for c in inside)]
    _check_room(
        len(tokens),
        wish.size,
        f"{len(special)} special tokens and {len(kept)} characters, most of them twice (fewer "
        "with --alphabet)",
    )
    ids = {token: number for number, token in enumerate(tokens)}
    order = sorted(normal)
    words = []
    for word in order:
        marked = [word[0], *(INSIDE + character for character in word[1:])]
        words.append([ids[token] for token in marked if token in ids])
    learn_merges(words, [normal[word] for word in order], tokens, wish.size, _joined, advance)
    vocab = {token: number for number, token in enumerate(tokens)}
    return wordpiece_definition(vocab, special, wish.lowercase)


def _joined(left: str, right: str) -> str:
    return left + right.removeprefix(INSIDE)


def _distinct(special: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Return the special tokens, each once. Raises ConfigError for one that is a token already."""
    found, known = list(dict.fromkeys(special)), set(taken)
    bad = next((token for token in found if not token or token in known), None)
    if bad is not None:
        raise ConfigError(f"--special {bad!r} is no name that text may have; try '<|endoftext|>'")
    return found


def _check_room(least: int, size: int, what: str) -> None:
    if size < least:
        raise ConfigError(
            f"a vocabulary of {size} tokens has no room for the {least} that it begins with: "
            f"{what}; use --vocab {least} or more"
        )


KINDS = {"bpe": Kind(_byte_words, _train_bpe), "wordpiece": Kind(_bert_words, _train_wordpiece)}


def count_words(kind: str, pieces: Iterable[str], wish: Wish) -> Counter[str]:
    """Return how often each word occurs in the pieces of a text."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(KINDS[kind].words(piece, wish))
    return counts


def train(
    kind: str, counts: Mapping[str, int], wish: Wish, advance: Advance = lambda number: None
) -> dict[str, Any]:
    """Return the tokenizer.json for counted words; `advance` is called for each new token.

    Raises ConfigError for a size below the tokens that a vocabulary begins with.
    """
    return KINDS[kind].train(counts, wish, advance)
