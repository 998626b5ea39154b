"""Files of token ids: formats that are read, and those that are refused by name."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.data.batches import Batches, eval_windows
from minillm.data.corpus import load_corpus
from minillm.data.token_files import open_tokens


def header(*words: int) -> bytes:
    return np.array(words + (0,) * (256 - len(words)), "<i4").tobytes()


def ids(number: int, below: int, dtype: str = "<u2") -> np.ndarray:
    return np.random.default_rng(3).integers(0, below, number).astype(dtype)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(20240520, 2, 4000) + ids(4000, 100).tobytes(), "version 2"),
        (header(20240520, 1, 4000)[:600], "hold 0"),
        (header(20251231, 1, 4000) + ids(4000, 100).tobytes(), "magic number 20251231"),
        (header(20240801, 7, 4001) + ids(4000, 100, "<u4").tobytes(), "4001 tokens.*hold 4000"),
    ],
    ids=["version", "short", "magic", "length"],
)
def test_headers_that_are_not_known_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        open_tokens(path)


@pytest.mark.parametrize("below", [1000, 50257, 100_277, 200_000])
@pytest.mark.parametrize("bits", [32, 64])
def test_wide_ids_without_a_header_are_refused_with_the_cure(
    tmp_path: Path, below: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ids(5000, below, f"<i{bits // 8}")
    written.tofile(tmp_path / "tokens.bin")
    with pytest.raises(ConfigError, match=f"ids of {bits} bits") as error:
        open_tokens(tmp_path / "tokens.bin")
    monkeypatch.chdir(tmp_path)
    (cure,) = re.findall(r'python -c "(.*)"', str(error.value))
    exec(cure)
    assert np.array_equal(open_tokens(tmp_path / "tokens.npy"), written)


@pytest.mark.parametrize(
    "tokens",
    [ids(5000, 50257), ids(5000, 20), ids(5000, 4), np.zeros(5000, "<u2"), np.arange(500)],
    ids=["gpt2", "twenty", "four", "zeros", "ascending"],
)
def test_uint16_ids_are_taken_as_they_are(tmp_path: Path, tokens: np.ndarray) -> None:
    tokens.astype("<u2").tofile(tmp_path / "tokens.bin")
    assert np.array_equal(open_tokens(tmp_path / "tokens.bin"), tokens)


def test_one_id_out_of_all_proportion_is_named(tmp_path: Path) -> None:
    tokens = ids(5000, 100, "<u4")
    tokens[1234] = 3_000_000_000
    np.save(tmp_path / "tokens.npy", tokens)
    with pytest.raises(ConfigError, match=r"token id 3000000000 at position 1234.*damaged"):
        load_corpus(str(tmp_path / "tokens.npy"), context=16)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)  # one of the files to be refused holds a pickle
    return file.getvalue()


GOOD = npy(ids(5000, 100))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a text that is called .npy\n" * 50, "does not begin as NumPy's"),
        (npy(np.array([{}, []], dtype=object)), "Python objects"),
        (GOOD.replace(b"(5000,)", b"(2**64,)"), "not an array file"),
        (GOOD.replace(b"(5000,), ", b"(9**20,),"), "not an array file"),
        (GOOD.replace(b"(5000,)", b"(True,)"), "holds|not an array file"),
        (GOOD.replace(b"(5000,), ", b"(18446744073709551616,), "), "not an array file"),
        (npy(np.zeros((3, 4), np.uint16)), r"uint16 \[3, 4\]"),
        (npy(np.zeros(9)), "float64"),
    ],
)
def test_damaged_arrays_are_one_message(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        open_tokens(path)
    assert str(path) in str(error.value) and "unsafe" not in str(error.value)


def test_every_flipped_bit_of_a_header_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    for bit in range(0, 8 * 96, 5):
        content = bytearray(GOOD)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            open_tokens(path)
        except ConfigError as error:
            assert str(path) in str(error)


def test_a_file_that_is_cut_while_it_is_mapped_is_named(tmp_path: Path) -> None:
    tokens = ids(50_000, 100)
    for name in ("cut.bin", "deleted.bin"):
        tokens.tofile(tmp_path / name)
    corpora = [load_corpus(str(tmp_path / name), context=16) for name in ("cut.bin", "deleted.bin")]
    (cut, cut_held), (deleted, _) = [
        (Batches(corpus.train, 16, 8, seed=1), eval_windows(corpus.held_out, 16))
        for corpus in corpora
    ]
    os.truncate(tmp_path / "cut.bin", 60_000)
    (tmp_path / "deleted.bin").unlink()
    assert deleted.microbatch(0, np.arange(8))[0].shape == (8, 16)
    for read in (lambda: cut.microbatch(0, [0]), lambda: cut_held.microbatch([0])):
        with pytest.raises(ConfigError, match=r"cut\.bin was cut to 60000 bytes"):
            read()
