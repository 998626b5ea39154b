"""Pairs: lines of two files, catalogues, the toy language, and what is refused."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest

from minillm.base.errors import ConfigError
from minillm.comm.single import SelfCommunicator
from minillm.data.pair_sources import _messages, read_pairs, toy
from minillm.models.seq2seq_config import Seq2SeqOptions
from minillm.tasks.translation import PairsToMeasure, TranslationObjective, TranslationOptions


def write(path: Path, text: str) -> str:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_lines_are_pairs(tmp_path: Path) -> None:
    source = write(tmp_path / "a.de.gz", "ein Hund\r\nzwei \n")
    target = write(tmp_path / "a.en", "a dog\ntwo")
    assert read_pairs(source, target) == [("ein Hund", "a dog"), ("zwei", "two")]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\n\nb\n", "a\nb\nc\n", r"line 2 of .*a\.de is empty"),
        ("a\nb\n", "a\n", r"a\.de has 2 lines and .*a\.en has 1: line 2 of .*a\.de has no"),
        ("a\n", "a\nb\n", r"a\.de has 1 lines and .*a\.en has 2: line 2 of .*a\.en has no"),
        ("", "", r"have no lines"),
    ],
)
def test_lines_without_a_counterpart_are_refused(
    source: str, target: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pairs(write(tmp_path / "a.de", source), write(tmp_path / "a.en", target))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "a.en", "a\n")
    with pytest.raises(ConfigError, match="No such file"):
        read_pairs(good, str(tmp_path / "none"))
    broken = tmp_path / "a.gz"
    broken.write_bytes(gzip.compress(b"a\n")[:-4])
    with pytest.raises(ConfigError, match=r"cannot read .*a\.gz"):
        read_pairs(str(broken), good)
    (tmp_path / "latin").write_bytes(b"\xe4\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*latin is not UTF-8 \(byte 0 .*0xe4\)"):
        read_pairs(str(tmp_path / "latin"), good)


@pytest.mark.parametrize("order", "<>")
def test_messages_of_a_catalogue(order: str) -> None:
    """Count a plural by its first form, and a message with a context not at all."""
    both = [(b"file\0files", b"Datei\0Dateien"), (b"menu\4Open", b"\xc3\x96ffnen"),
            (b"Close", "Schließen".encode())]  # fmt: skip
    start, tables, texts = 20 + 16 * len(both), [b"", b""], b""
    for pair in both:
        for side, text in enumerate(pair):
            tables[side] += struct.pack(f"{order}2I", len(text), start + len(texts))
            texts += text + b"\0"
    head = struct.pack(f"{order}5I", 0x950412DE, 0, len(both), 20, 20 + 8 * len(both))
    data = head + tables[0] + tables[1] + texts
    assert list(_messages(data)) == [("file", "Datei"), ("Close", "Schließen")]


def test_the_toy_language_follows_its_rule() -> None:
    pairs = toy()
    assert len(pairs) == len(dict(pairs)) == 20_000
    following = dict(zip("aeiou", "eioua", strict=True))
    for source, target in pairs[::500]:
        words = ["".join(following.get(c, c) for c in word) for word in source.split()]
        assert target.split() == words[::-1] and 2 <= len(words) <= 6


def test_pairs_are_split_and_long_ones_left_out(tmp_path: Path) -> None:
    lines = [f"{'a' * (1 + i % 9)} {i}" for i in range(40)]
    files = {side: write(tmp_path / side, "\n".join(lines)) for side in ("source", "target")}
    comm, shape, objective = SelfCommunicator(), Seq2SeqOptions(context=12), TranslationObjective()
    found = objective.load(TranslationOptions(**files), shape, None, comm)
    fit = [line for line in lines if len(line) < 12]
    assert len(found.train) == sum(len(line) < 12 for line in lines[:38])
    assert len(found.train) + len(found.held_out) == len(fit)
    assert [lines[number] for number in found.too_long] == [x for x in lines if len(x) >= 12]
    assert found.vocab_size == len(set("".join(lines))) + 1
    asked = TranslationOptions(**files, truncate=False)
    with pytest.raises(ConfigError, match=r"line 18 of .*source has .* than the 11 .*--context 12"):
        objective.load(asked, shape, None, comm)
    short = {side: write(tmp_path / f"{side}.short", "a\nb") for side in ("source", "target")}
    asked = TranslationOptions(
        **short, val_source=files["source"], val_target=files["target"], truncate=False
    )
    with pytest.raises(ConfigError, match=r"line 18 of .*source has a side"):
        objective.load(asked, shape, None, comm)
    again = objective.held_out(
        PairsToMeasure(), TranslationOptions(**files), shape, found.vocabulary(), found.sha256, comm
    )
    assert (
        again.num_held_out
        == found.num_held_out
        == sum(len(line) + 1 for line in lines[38:] if len(line) < 12)
    )
    write(tmp_path / "source", "\n".join(["b", *lines[1:]]).replace("b", "a"))
    with pytest.raises(ConfigError, match="has changed since training"):
        objective.held_out(
            PairsToMeasure(), TranslationOptions(**files), shape, found.vocabulary(), found.sha256,
            comm,
        )  # fmt: skip
    only = {side: write(tmp_path / f"{side}.1", "a") for side in ("source", "target")}
    alone = objective.load(TranslationOptions(**only), shape, None, comm)
    with pytest.raises(ConfigError, match=r"source\.1 holds no pair out; name some"):
        objective.held_out(
            PairsToMeasure(), TranslationOptions(**only), shape, alone.vocabulary(), alone.sha256,
            comm,
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"all 38 pairs of .* are longer than --context 2"):
        objective.load(TranslationOptions(**files), Seq2SeqOptions(context=2), None, comm)
    with pytest.raises(ConfigError, match=r"--source .* has no counterpart; pass --target"):
        objective.load(TranslationOptions(source=files["source"]), shape, None, comm)


def test_built_in_pairs_have_a_name_in_every_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert TranslationOptions(source="toy").located() == {"source": "toy"}
    files = TranslationOptions(source="a.de", target="~/a.en").located()
    assert files == {"source": str(tmp_path / "a.de"), "target": os.path.expanduser("~/a.en")}
