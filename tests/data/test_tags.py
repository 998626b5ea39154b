"""Entities of tags: sentences of every scheme by hand, all short ones by conlleval's tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from minillm.data.tags import (
    Span,
    is_tag,
    labels_of_types,
    scheme_of,
    spans_of,
    strict_spans_of,
    tags_of,
)

# Two persons side by side, a place of three words behind them, and a single one at the end.
WANTED = [Span("p", 0, 1), Span("p", 1, 3), Span("l", 3, 6), Span("p", 7, 8)]
SCHEMES = {
    "IOB2": "B-p B-p I-p B-l I-l I-l O B-p",
    "IOB1": "I-p B-p I-p I-l I-l I-l O I-p",
    "IOBES": "S-p B-p E-p B-l I-l E-l O S-p",
    "BILOU": "U-p B-p L-p B-l I-l L-l O U-p",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_same_entities(scheme: str) -> None:
    tags = SCHEMES[scheme].split()
    assert spans_of(tags) == WANTED
    assert scheme_of([["O", "O"], tags]) == scheme
    assert " ".join(tags_of(WANTED, 8)) == SCHEMES["IOB2"]
    assert all(is_tag(tag) for tag in tags)


def conlleval(tags: tuple[str, ...]) -> list[Span]:
    """Return the entities by the tables of conlleval: where a chunk ends and where one starts."""
    ends = {*("E" + t for t in "BIESO"), *("S" + t for t in "BIESO")}
    ends |= {a + b for a in "BI" for b in "BSO"}
    starts = {*(p + t for p in "BIESO" for t in "BS"), *("EE", "EI", "SE", "SI", "OE", "OI")}
    found, start, before = [], 0, "O"
    for place, tag in enumerate((*tags, "O")):
        changes = before[2:] != tag[2:]
        if before != "O" and (before[0] + tag[0] in ends or changes):
            found.append(Span(before[2:], start, place))
        if tag != "O" and (before[0] + tag[0] in starts or changes):
            start = place
        before = tag
    return found


def test_every_short_sentence_has_the_entities_of_conlleval() -> None:
    """Read all 6561 sentences of four words over two types."""
    marks = ["O", *(f"{mark}-{type_}" for mark in "BIES" for type_ in "xy")]
    for tags in itertools.product(marks, repeat=4):
        assert spans_of(tags) == conlleval(tags), tags


def test_strict_entities_begin_with_b_alone() -> None:
    assert strict_spans_of(["I-p", "I-p", "O", "B-p", "I-l", "I-p", "B-l", "I-l"]) == [
        Span("p", 3, 4),
        Span("l", 6, 8),
    ]
    rng = np.random.default_rng(1)
    for _ in range(50):  # what is valid means the same in both modes
        tags = rng.choice(["O", "B-x", "I-x", "B-y", "I-y"], 8).tolist()
        valid = tags_of(spans_of(tags), 8)
        assert strict_spans_of(valid) == spans_of(valid) == spans_of(tags)


def test_seqeval_reads_the_same_entities() -> None:
    """Compare both modes with the package on random tags."""
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    from seqeval.scheme import IOB2, Entities

    rng = np.random.default_rng(0)
    for _ in range(300):
        tags = rng.choice(["O", "B-x", "I-x", "B-y", "I-y", "E-x", "S-y"], 9).tolist()
        found = [(type_, start, end - 1) for type_, start, end in spans_of(tags)]
        assert found == labeling.get_entities(tags)
        tags = [tag for tag in tags if tag[0] not in "ES"]
        if tags:
            strict = [each.to_tuple()[1:] for each in Entities([tags], IOB2).entities[0]]
            assert [(t, s, e) for t, s, e in strict_spans_of(tags)] == strict


def test_tags_that_are_none() -> None:
    assert not any(is_tag(tag) for tag in ["", "B", "B-", "o", "NOUN", "X-p", "B_p", "-p"])
    assert labels_of_types(["place", "b", "place"]) == ["O", "B-b", "I-b", "B-place", "I-place"]
