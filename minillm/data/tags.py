"""Tags of words: entities in the schemes IOB1, IOB2, IOBES and BILOU, and conversion to IOB2.

A tag is O outside of entities, else a mark, "-" and a type, as in B-person.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
MARKS = "BIESLU"  # begin, inside, end, single; BILOU has last and unit in their places
_PLAIN = str.maketrans("LU", "ES")


class Span(NamedTuple):
    """Entity: words [start, end) of a sentence."""

    type: str
    start: int
    end: int


def is_tag(tag: str) -> bool:
    """Return whether a word is O, or a mark with a type."""
    return tag == OUTSIDE or (len(tag) > 2 and tag[0] in MARKS and tag[1] == "-")


def mark_of(tag: str) -> str:
    """Return the mark of a tag, that of IOBES where BILOU has another."""
    return tag[0].translate(_PLAIN)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the entities of a sentence, whatever its scheme, as conlleval and seqeval read them.

    An entity begins at B and S, and at any other mark behind O, behind another type, or behind the
    end of an entity (E or S).
    """
    found, before = list[Span](), OUTSIDE
    for place, tag in enumerate(tags):
        if tag != OUTSIDE:
            goes_on = before[2:] == tag[2:] and mark_of(before) in "BI" and mark_of(tag) in "IE"
            start = found.pop().start if goes_on else place
            found.append(Span(tag[2:], start, place + 1))
        before = tag
    return found


def strict_spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the entities of a sentence that are valid IOB2: a B, and the I of its type behind it.

    Other marks belong to no entity, as in seqeval with mode="strict" and scheme=IOB2.
    """
    found, open_ = list[Span](), False
    for place, tag in enumerate(tags):
        if tag.startswith("B-"):
            found.append(Span(tag[2:], place, place + 1))
            open_ = True
        elif open_ and tag.startswith("I-") and tag[2:] == found[-1].type:
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            open_ = False
    return found


def tags_of(spans: Iterable[Span], number: int) -> tuple[str, ...]:
    """Return the tags in IOB2 of a sentence of `number` words with these entities."""
    tags = [OUTSIDE] * number
    for type_, start, end in spans:
        tags[start:end] = [f"B-{type_}", *[f"I-{type_}"] * (end - start - 1)]
    return tuple(tags)


def scheme_of(sentences: Iterable[Sequence[str]]) -> str:
    """Return the scheme of tags: IOB2, IOB1, IOBES or BILOU.

    IOB1 is one in which no B follows O or another type. Where nothing tells the schemes apart, it
    is IOB2.
    """
    needless, opening = 0, 0  # B that IOB1 would not write, I that IOB2 would not
    for tags in sentences:
        for before, tag in zip((OUTSIDE, *tags), tags, strict=False):
            if tag[0] in "ES":
                return "IOBES"
            if tag[0] in "LU":
                return "BILOU"
            begins = before == OUTSIDE or before[2:] != tag[2:]
            needless += begins and tag[0] == "B"
            opening += begins and tag[0] == "I"
    return "IOB1" if opening and not needless else "IOB2"


def labels_of_types(types: Iterable[str]) -> list[str]:
    """Return the labels of a tagger in IOB2: O, then B and I of each type in order."""
    marked = (f"{mark}-{type_}" for type_ in sorted(set(types)) for mark in "BI")
    return [OUTSIDE, *marked]


def types_of(labels: Iterable[str]) -> list[str]:
    """Return the types of entities in labels, in order."""
    return sorted({label[2:] for label in labels if label != OUTSIDE})
