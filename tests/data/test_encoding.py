"""Encoding by all ranks together: the ids of one rank, kept in a cache that later starts map."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.comm.threads import run_ranks
from minillm.data import cache as cache_module
from minillm.data import encoding, remembered
from minillm.data.corpus import Corpus, load_corpus
from minillm.data.tokenizers import ByteTokenizer, CharTokenizer
from minillm.tokenizers import pieces
from minillm.tokenizers.pieces import cut_pieces

LINES = [f"Zeile {i}: über {i * i} Maß, 漢字 und 😀\n" for i in range(300)]
TEXT = "".join(LINES) + "x" * 700 + " y" * 300  # at the end lines longer than two pieces
PIECE = 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all ranks encode short texts together, in small pieces."""
    monkeypatch.setattr(encoding, "ALONE_BYTES", 0)
    monkeypatch.setattr(encoding, "ALONE_BYTES_SUBWORDS", 0)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", PIECE)


def load(path: Path, spec: str, folder: Path, ranks: int = 1, **options: Any) -> list[Corpus]:
    def rank(comm: Any) -> Corpus:
        return load_corpus(str(path), spec, context=16, cache=str(folder), comm=comm, **options)

    return run_ranks(ranks, rank, **({"nodes": (0, 0, 1)} if ranks == 3 else {}))


def content(corpus: Corpus) -> tuple[bytes, bytes, bytes]:
    assert corpus.held_out_lengths is not None
    lengths = corpus.held_out_lengths.astype(np.uint32)
    return corpus.train.tobytes(), corpus.held_out.tobytes(), lengths.tobytes()


@pytest.mark.parametrize("blocks", [1, 7, 99, 100, 101, 1000, 10**6])
def test_pieces_do_not_depend_on_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", PIECE)
    found = list(cut_pieces(TEXT[i : i + blocks] for i in range(0, len(TEXT), blocks)))
    assert "".join(found) == TEXT
    lines, rest = "".join(LINES), TEXT[len("".join(LINES)) :]
    start = 0
    while (end := lines.find("\n", start + PIECE - 1)) >= 0:
        assert found.pop(0) == lines[start : end + 1]
        start = end + 1
    begin = lines[start:]  # the last lines are shorter than a piece; then 700 x, then blanks
    assert found[0] == (begin + rest)[: 2 * PIECE] and max(map(len, found)) <= 2 * PIECE
    assert all(piece.startswith(" ") for piece in found[-2:])
    assert list(cut_pieces(["x" * (PIECE - 1) + "\n" + "y\n"]))[1:] == ["y\n"]


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300", "wordpiece:300"])
def test_every_number_of_ranks_gives_the_ids_of_one(
    spec: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", PIECE)
    (alone,) = load(path, spec, tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    monkeypatch.setattr(encoding, "ALONE_BYTES", 0)
    monkeypatch.setattr(encoding, "ALONE_BYTES_SUBWORDS", 0)
    for ranks in (1, 2, 3):
        for corpus in load(path, spec, tmp_path / f"cache {ranks}", ranks):
            assert isinstance(corpus.train, np.memmap)
            assert content(corpus) == content(alone) and corpus.sha256 == alone.sha256
    decoded = alone.tokenizer.decode(alone.train) + alone.tokenizer.decode(alone.held_out)
    assert decoded == TEXT or spec.startswith("wordpiece")
    held = TEXT[len(TEXT) - int(0.1 * len(TEXT)) :]
    assert alone.held_out_lengths is not None and alone.held_out_lengths.sum() == len(held.encode())


def test_a_later_start_maps_what_the_first_has_written(
    path: Path, tmp_path: Path, together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = load(path, "char", tmp_path / "cache")

    def never(*arguments: object) -> None:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patched:
        patched.setattr(CharTokenizer, "encode", never)
        for corpus in load(path, "char", tmp_path / "cache", 2):
            assert content(corpus) == content(first)
    path.write_text(TEXT + "z")
    (changed,) = load(path, "char", tmp_path / "cache")
    assert len(changed.train) + len(changed.held_out) == len(TEXT) + 1


@pytest.mark.parametrize("damage", ["cut", "zero", "json", "gone"])
def test_a_damaged_entry_is_written_again(
    damage: str, path: Path, tmp_path: Path, together: None
) -> None:
    (first,) = load(path, "byte", tmp_path / "cache")
    expected = content(first)
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    train = entry / "train"
    match damage:
        case "cut":
            train.write_bytes(train.read_bytes()[:-1])
        case "zero":
            train.write_bytes(bytes(train.stat().st_size))
        case "json":
            (entry / "entry.json").write_text("[]")
        case "gone":
            train.unlink()
    for corpus in load(path, "byte", tmp_path / "cache", 2):
        assert content(corpus) == expected
    assert [child.name for child in (tmp_path / "cache" / "tokens").iterdir()] == [entry.name]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cache_that_cannot_be_written_costs_a_line(
    ranks: int, path: Path, tmp_path: Path, together: None, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for corpus in load(path, "char", tmp_path / "file", ranks):
        assert len(corpus.train) + len(corpus.held_out) == len(TEXT)
        assert corpus.tokenizer.decode(corpus.held_out) == TEXT[-len(corpus.held_out) :]
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_a_full_disk_ends_all_ranks_with_a_message(
    path: Path, tmp_path: Path, together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: object) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(cache_module, "open", lambda *_: Full(), raising=False)
    with pytest.raises(Exception, match=r"No space left on device.*--cache"):
        load(path, "byte", tmp_path / "cache", 2)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_two_runs_may_write_an_entry_at_once(path: Path, tmp_path: Path, together: None) -> None:
    found: list[Corpus] = []
    runs = [
        threading.Thread(target=lambda: found.extend(load(path, "char", tmp_path / "cache", 2)))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(found) == 6 and len({content(corpus) for corpus in found}) == 1
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def on_rank_1(usual: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `other` on rank 1 and `usual` elsewhere."""
    return lambda *arguments: (other if threading.current_thread().name == "rank 1" else usual)(
        *arguments
    )


def test_ids_that_differ_on_one_rank_are_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ByteTokenizer.encode
    monkeypatch.setattr(
        ByteTokenizer, "encode", on_rank_1(usual, lambda *given: usual(*given)[::-1].copy())
    )
    with pytest.raises(ConfigError, match=r"tokens of .* are not the same on all ranks"):
        load(path, "byte", tmp_path / "cache", 2)


@pytest.mark.parametrize("extra", ["!", "!" * 1000], ids=["last piece", "more pieces"])
def test_a_text_that_differs_on_one_rank_is_refused(
    extra: str, path: Path, tmp_path: Path, together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = encoding.read_blocks

    def longer(source: Any) -> Any:
        yield from usual(source)
        yield extra

    monkeypatch.setattr(encoding, "read_blocks", on_rank_1(usual, longer))
    with pytest.raises(ConfigError, match="not the same on all ranks"):
        load(path, "byte", tmp_path / "cache", 2)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_held_out_data_of_its_own(path: Path, tmp_path: Path, together: None) -> None:
    other = tmp_path / "val.txt"
    other.write_text("Zeile ü, another text\n" * 9, encoding="utf-8")
    for corpus in load(path, "char", tmp_path / "cache", 2, val_data=str(other)):
        assert corpus.tokenizer.decode(corpus.train) == TEXT
        assert corpus.tokenizer.decode(corpus.held_out) == other.read_text(encoding="utf-8")
        assert corpus.held_out_bytes(7) == 8  # "eile ü,": seven characters
    ids = np.arange(100, dtype=np.uint16)
    for name in ("a.bin", "b.bin"):
        ids.tofile(tmp_path / name)
        ids = ids[:40]
    corpus = load_corpus(str(tmp_path / "a.bin"), context=8, val_data=str(tmp_path / "b.bin"))
    assert (len(corpus.train), len(corpus.held_out)) == (100, 40)
    with pytest.raises(ConfigError, match=r"is text, but --val-data .* is token ids"):
        load(path, "byte", tmp_path / "cache", val_data=str(tmp_path / "a.bin"))


def test_bits_per_byte_count_the_bytes_of_the_scored_tokens(tmp_path: Path) -> None:
    """Compare two texts that begin alike and go on in characters of one or of four bytes."""
    start = "a plain beginning\n" * 60
    for name, rest in (("ascii.txt", "b" * 3000), ("wide.txt", "😀" * 3000)):
        (tmp_path / name).write_text(start + rest, encoding="utf-8")
    found = [
        load_corpus(str(tmp_path / name), "char", context=1, held_out=1.0)
        for name in ("ascii.txt", "wide.txt")
    ]
    assert [corpus.held_out_bytes(1000) for corpus in found] == [1000, 1000]
    assert found[1].held_out_bytes(4079) == 1079 + 4 * 3000


def test_the_hash_of_large_files_is_kept_until_they_change(
    path: Path, tmp_path: Path, together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SCANNED_BYTES", 0)
    scans: list[int] = []
    usual = remembered.scan
    monkeypatch.setattr(remembered, "scan", lambda *given: (scans.append(1), usual(*given))[1])
    load(path, "byte", tmp_path / "cache")  # too young to be kept
    assert not (tmp_path / "cache" / "scans").exists()
    monkeypatch.setattr(remembered, "SETTLED", -1e9)
    first, again = (load(path, "byte", tmp_path / "cache")[0] for _ in range(2))
    assert len(scans) == 2 and again.sha256 == first.sha256
    times = path.stat()
    path.write_text(TEXT.replace("Zeile 0", "Zeile 9"), encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size, inode and mtime as before
    (changed,) = load(path, "byte", tmp_path / "cache")
    assert len(scans) == 3 and bytes(changed.train[:7]) == b"Zeile 9"
    for damaged in (tmp_path / "cache" / "scans").iterdir():
        damaged.write_text("[]")
    assert load(path, "byte", tmp_path / "cache")[0].sha256 == changed.sha256


def test_a_learnt_tokenizer_is_kept(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "KEPT_BYTES", 0)
    learnt: list[str] = []
    usual = remembered.make_tokenizer
    monkeypatch.setattr(
        remembered, "make_tokenizer", lambda *given: (learnt.append(given[0]), usual(*given))[1]
    )
    first, again = (load(path, "char", tmp_path / "cache")[0] for _ in range(2))
    assert learnt == ["char"] and content(first) == content(again)
    for damaged in (tmp_path / "cache" / "tokenizers").iterdir():
        damaged.write_text('{"kind": "char"}')
    assert content(load(path, "char", tmp_path / "cache")[0]) == content(first)
    assert learnt == ["char", "char"]
