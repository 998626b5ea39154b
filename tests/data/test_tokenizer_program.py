"""`minillm tokenizer train` and `encode`: files, ranks, and wrong options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun

from minillm.base.errors import ConfigError
from minillm.comm.threads import run_ranks
from minillm.data import tokenizer_program
from minillm.data.token_files import open_tokens
from minillm.data.token_writer import TokenFileWriter
from minillm.data.tokenizer_program import EncodeArgs, TrainArgs
from minillm.data.tokenizers import make_tokenizer
from minillm.tokenizers import pieces

TEXT = "".join(f"Zeile {i}: über {i * i} Maße, 漢字 und \U0001f600 don't\n" for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def program(*words: Any) -> int:
    return tokenizer_program.main([str(word) for word in words])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_vocabulary_is_learnt_and_encodes(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokens = tmp_path / "out", tmp_path / "tokens.bin"
    words = ("--data", text, "--out", out, "--special", "<|end|>,<|user|>")
    assert program("train", "--kind", kind, "--vocab", 400, *words) == 0
    said = capsys.readouterr().out
    vocab = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert f"learnt  {len(vocab)} tokens" in said and f"--tokenizer {out}" in said
    first = 0 if kind == "bpe" else 5
    assert [vocab["<|end|>"], vocab["<|user|>"]] == [first, first + 1]

    wanted = make_tokenizer(str(out), "").encode(TEXT)
    words = ("--tokenizer", out, "--input", text)
    assert program("encode", *words, "--output", tokens, "--offsets") == 0
    assert f"{len(wanted):,} tokens" in capsys.readouterr().out
    assert open_tokens(tokens).tolist() == wanted.tolist()
    places = np.load(tmp_path / "tokens.offsets.npy")
    assert program("encode", *words) == 0
    assert capsys.readouterr().out.split() == [str(number) for number in wanted]
    assert program("encode", *words, "--offsets") == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    spelt = {number: token for token, number in vocab.items()}
    assert lines == [
        f"{number}\t{start}\t{end}\t{spelt[number]}"
        for number, (start, end) in zip(wanted.tolist(), places.tolist(), strict=True)
    ]
    if kind == "wordpiece":
        pairs = zip(wanted.tolist(), places.tolist(), strict=True)
        assert all(
            spelt[number].removeprefix("##") in (TEXT[a:b], "[UNK]") for number, (a, b) in pairs
        )


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_every_number_of_ranks_learns_and_encodes_the_same(
    kind: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1000)
    found = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        trained = TrainArgs(kind=kind, vocab=450, data=str(text), out=str(folder / "out"))
        run_ranks(ranks, lambda comm, asked=trained: tokenizer_program._train(comm, asked))
        encode = EncodeArgs(
            tokenizer=str(folder / "out"),
            input=str(text),
            output=str(folder / "x.bin"),
            offsets=True,
        )
        run_ranks(ranks, lambda comm, asked=encode: tokenizer_program._encode(comm, asked))
        names = ("out/tokenizer.json", "x.bin", "x.offsets.npy")
        found.append([(folder / name).read_bytes() for name in names])
        assert not [path for path in folder.rglob("*") if path.name.startswith(".tmp")]
    assert found[0] == found[1] == found[2]
    starts, ends = np.load(tmp_path / "1" / "x.offsets.npy").T
    assert np.all(np.diff(starts) >= 0)
    assert ends[-1] == len(TEXT if kind == "bpe" else TEXT.rstrip())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--out", "{}/new", "--vocab", "100"], "has no room for the 256"),
        (["train", "--out", "{}"], "exists; name a new one"),
        (["train", "--out", "{}/new", "--lowercase"], "--lowercase belongs to --kind wordpiece"),
        (["train", "--out", "{}/new", "--special", "a"], "--special 'a' is no name"),
        (["train", "--out", "{}/new", "--data", "{}/ids.bin"], "holds token ids; name a text"),
        (["train", "--out", "{}/new", "--data", "{}/empty.txt"], "has no words"),
        (["train"], "--out"),
        (["learn"], "choose one of train, encode"),
        (["encode", "--tokenizer", "bpe:500", "--input", "{}/text.txt"], "is learnt from text"),
        (["encode", "--tokenizer", "{}", "--input", "{}/text.txt"], "holds no tokenizer"),
        (
            ["encode", "--tokenizer", "byte", "--input", "{}/text.txt", "--offsets"],
            "--offsets needs a sub-word tokenizer, not byte",
        ),
        (
            ["encode", "--tokenizer", "byte", "--input", "{}/text.txt", "--output", "{}/x.txt"],
            "must end in .bin",
        ),
        (
            ["encode", "--tokenizer", "byte", "--input", "{}/text.txt", "--output", "{}/ids.bin"],
            "ids.bin exists",
        ),
        (
            ["encode", "--tokenizer", "byte", "--input", "{}/bad.txt", "--output", "{}/x.bin"],
            "is not UTF-8 text: byte 0xff at position 3",
        ),
    ],
)
def test_wrong_options_are_one_message(
    words: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ids.bin").write_bytes(b"\0" * 64)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\n")
    before = sorted(tmp_path.rglob("*"))
    assert program(*(word.format(tmp_path) for word in words)) != 0
    said = capsys.readouterr()
    assert message in said.err and said.err.count("error: ") == 1 and "Traceback" not in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_large_vocabularies_are_written_as_llmc_does(tmp_path: Path) -> None:
    ids = np.array([0, 70_000, 99_999])
    writer = TokenFileWriter(tmp_path / "x.bin", 100_000, places=False)
    writer.add(ids[:2], None)
    writer.add(ids[2:], None)
    writer.finish()
    assert open_tokens(tmp_path / "x.bin").tolist() == ids.tolist()
    with pytest.raises(ConfigError, match="exists"):
        TokenFileWriter(tmp_path / "x.bin", 100_000, places=False)


@needs_mpirun
@pytest.mark.slow
def test_ranks_learn_and_encode_under_mpirun(text: Path, tmp_path: Path) -> None:
    out, module = tmp_path / "out", ["-m", "minillm.data.tokenizer_program"]
    found = mpirun(2, [*module, "train", "--data", str(text), "--out", str(out), "--vocab", "300"])
    assert found.returncode == 0 and found.output.count("learnt  300 tokens") == 1, found.output
    words = ["encode", "--tokenizer", str(out), "--input", str(text)]
    found = mpirun(2, [*module, *words, "--output", str(tmp_path / "x.bin")])
    assert found.returncode == 0 and found.output.count("saved") == 1, found.output
    wanted = make_tokenizer(str(out), "").encode(TEXT)
    assert open_tokens(tmp_path / "x.bin").tolist() == wanted.tolist()
    found = mpirun(2, [*module, "train", "--data", str(text), "--out", str(out)])
    assert found.returncode != 0 and found.output.count("exists; name a new one") == 1
