"""Corpora: sources of text and tokens, their split, and the same data on every rank."""

from __future__ import annotations

import hashlib
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.corpus import Corpus, load_corpus
from minillm.data.sources import stdlib_files
from minillm.data.tokenizers import tokenizer_from_json

TEXT = "".join(f"Zeile {i}: über {i * i}\n" for i in range(200))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_stdlib_is_in_fixed_order_and_leaves_out_tests_and_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in stdlib_files()]
    assert names == sorted(names, key=str.encode) and {"abc.py", "json/decoder.py"} <= set(names)
    assert not [
        name
        for name in names
        if {"test", "tests", "site-packages", "_bundled"} & set(name.split("/")[:-1])
    ]


def test_stdlib_holds_out_its_last_twentieth() -> None:
    corpus = load_corpus("stdlib", context=128)
    text = b"".join(file.read_bytes().decode().encode() for file in stdlib_files()[:1])
    assert corpus.vocab_size == 256 and bytes(corpus.train[: len(text)].astype(np.uint8)) == text
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert share == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_text_is_cut_in_two_and_comes_back(path: Path, tokenizer: str) -> None:
    corpus = load_corpus(str(path), tokenizer, context=16)
    restored = tokenizer_from_json(corpus.tokenizer.to_json())
    assert restored.decode(corpus.train) + restored.decode(corpus.held_out) == TEXT
    assert corpus.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert len(restored.decode(corpus.held_out)) == int(0.1 * len(TEXT))
    scored = restored.decode(corpus.held_out[1:9])
    assert corpus.held_out_bytes(8) == len(scored.encode())
    assert corpus.vocab_size == (256 if tokenizer == "byte" else len(set(TEXT)))


def test_folder_reads_its_texts_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("second, without an end of line")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "c.tex").write_text("not of a kind that is read")
    corpus = load_corpus(str(tmp_path), context=4, held_out=0.0)
    assert corpus.tokenizer.decode(corpus.train) == "first\nsecond, without an end of line\n"


def test_token_files(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    ids[:100].tofile(tmp_path / "val.bin")
    np.save(tmp_path / "other.npy", ids)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + ids.tobytes())
    whole = load_corpus(str(tmp_path / "train.bin"), context=16)
    assert (
        isinstance(whole.train, np.memmap)
        and np.array_equal(whole.train, ids)
        and np.array_equal(whole.held_out, ids[:100])
    )
    for name in ("other.npy", "llmc.bin"):
        corpus = load_corpus(str(tmp_path / name), context=16)
        assert (
            np.array_equal(np.concatenate([corpus.train, corpus.held_out]), ids)
            and len(corpus.held_out) == 500
        )
        assert corpus.vocab_size == int(ids.max()) + 1 and corpus.held_out_bytes(10) is None


def test_all_ranks_have_the_same(path: Path) -> None:
    found: list[Corpus] = run_ranks(
        3, lambda comm: load_corpus(str(path), "char", context=16, comm=comm)
    )
    assert len({(c.sha256, c.train.tobytes(), c.held_out.tobytes()) for c in found}) == 1


def test_a_text_that_differs_on_one_rank_is_refused_on_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm.data import encoding as module

    usual = module.read_blocks

    def read(source: Any) -> Iterator[str]:
        yield from usual(source)
        if threading.current_thread().name == "rank 1":
            yield "!"

    monkeypatch.setattr(module, "read_blocks", read)

    def rank(comm: Communicator) -> str:
        with pytest.raises(ConfigError, match="not the same on all ranks") as error:
            load_corpus(str(path), context=16, comm=comm)
        return str(error.value)

    assert len(set(run_ranks(3, rank))) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("stdlb", "Did you mean 'stdlib'"),
        ("/nowhere", "no such file or folder"),
        ("/dev/null", "neither a file nor"),
    ],
)
def test_unknown_sources_are_named(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_corpus(source, context=16)


def test_shakespeare_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch", reason="needs pooch: pip install -e '.[data]'")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(
        ConfigError, match=r"could not fetch --data shakespeare .*no route to host.*--data stdlib"
    ):
        load_corpus("shakespeare", context=16)
