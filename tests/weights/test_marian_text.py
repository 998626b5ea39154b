"""Marian's translators on text: two SentencePiece models, and marks inside the vocabulary."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import save_file
from test_exporting import export

from minillm.autograd.tape import no_grad
from minillm.base.errors import ConfigError
from minillm.comm.single import SelfCommunicator
from minillm.data.sentence_pieces import foreign_marks
from minillm.data.tokenizers import tokenizer_from_json
from minillm.inference import translate
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.weights import importing
from minillm.weights.foreign import Foreign

SOURCES = ["ein haus am see", "der hund schläft", "ein see", "das haus schläft am see"]
TARGETS = ["a house at the lake", "the dog sleeps", "a lake", "the house sleeps at the lake"]


def package() -> Any:
    """Return the package that learns and reads the models; skip the test without it."""
    return pytest.importorskip("sentencepiece", reason="the package sentencepiece is missing")


def learnt(lines: list[str]) -> bytes:
    out = io.BytesIO()
    package().SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_writer=out, vocab_size=30, minloglevel=2,
        hard_vocab_limit=False, bos_id=-1, eos_id=0, unk_id=1,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture
def marian(tmp_path: Path) -> Path:
    """Write a folder as Marian's, with random weights."""
    sentencepiece = package()
    path = tmp_path / "m"
    path.mkdir()
    models, pieces = {"source": learnt(SOURCES), "target": learnt(TARGETS)}, ["</s>", "<unk>"]
    for side, model in models.items():
        (path / f"{side}.spm").write_bytes(model)
        held = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces += [held.id_to_piece(i) for i in range(held.get_piece_size())]
    names = [*dict.fromkeys([*pieces, ">>eng<<"]), "<pad>"]
    (path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    size, wanted = len(names), json.loads((Path(__file__).parent / "encoders.json").read_text())
    case = wanted["marian"]
    marks = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), size - 1)
    sizes = {"vocab_size": size, "decoder_vocab_size": size}
    (path / "config.json").write_text(json.dumps(case["config"] | sizes | marks))
    shapes = {
        name: [size if n == tiny_models.VOCAB else n for n in shape]
        for name, shape in case["shapes"].items()
    }
    save_file(
        # Large, so that the translations differ.
        {n: len(s) ** 2 * tiny_models.tensor(n, tuple(s)) for n, s in shapes.items()},
        path / "model.safetensors",
    )
    return path


def plain(path: Path, text: str, most: int = 10) -> str:
    """Return the greedy translation by whole passes: pieces, `</s>`, and the pad that begins."""
    sentencepiece, comm = package(), SelfCommunicator()
    vocab = json.loads((path / "vocab.json").read_text())
    sides = [
        sentencepiece.SentencePieceProcessor(model_file=str(path / f"{side}.spm"))
        for side in ("source", "target")
    ]
    pieces = sides[0].encode(text, out_type=str)
    source = np.array([[*(vocab.get(piece, vocab["<unk>"]) for piece in pieces), vocab["</s>"]]])
    opened = open_checkpoint(str(path), comm)
    model: Any = load_trained(opened, opened.resolve(ReadOptions(), 1), comm).stages[0].model
    names, found = {i: name for name, i in vocab.items()}, [vocab["<pad>"]]
    while len(found) <= most:
        where = Where(0, np.arange(1), np.arange(len(found)))
        arrays = {"source": source, "target": np.array([found])}
        limits = KeyLimits(np.array([source.shape[1]]))
        batch = Batch(arrays, {}, where, memory=limits)
        with no_grad():
            logits = model.logits(model.forward((), batch, False).outputs, batch)
        found.append(int(logits[0, -1, : vocab["<pad>"]].argmax()))
        if found[-1] == vocab["</s>"]:
            break
    text = sides[1].decode([names[i] for i in found[1:] if i != vocab["</s>"]])
    return text.replace("▁", " ").strip()


def test_lines_are_translated(
    marian: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Translate by a folder, by a run, and by an export of it."""
    assert importing.main([str(marian), "--out", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", "--out", tmp_path / "back")
    for name in ("source.spm", "target.spm"):
        assert (tmp_path / "back" / name).read_bytes() == (marian / name).read_bytes()
    vocab = json.loads((marian / "vocab.json").read_text())
    assert json.loads((tmp_path / "back" / "vocab.json").read_text()) == vocab
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["eos_token_id"] == 0 and config["pad_token_id"] == len(vocab) - 1
    wanted = [plain(marian, line) for line in SOURCES]
    assert len(set(wanted)) > 1
    for path in (marian, tmp_path / "run", tmp_path / "back"):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(SOURCES)))
        assert translate.main([str(path), "--tokens", "10"]) == 0
        assert capsys.readouterr().out.splitlines() == wanted


def test_sides_and_languages(marian: Path) -> None:
    tokenizer: Any = tokenizer_from_json(Foreign(marian).tokenizer)
    vocab = json.loads((marian / "vocab.json").read_text())
    source, target = tokenizer.encode("ein haus"), tokenizer.target.encode("a house")
    assert tokenizer.decode(target) == "a house" and tokenizer.marks[:2] == (0, len(vocab) - 1)
    marked = tokenizer.encode(">>eng<< ein haus").tolist()
    assert marked == [vocab[">>eng<<"], *source.tolist()]
    again: Any = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.encode("das haus").tolist() == tokenizer.encode("das haus").tolist()


def test_marks_must_fit() -> None:
    assert foreign_marks([18, 0], 19) == (0, 18, 19)
    for pair in ([0, 0], [18, 18], [18, None], [None, 0], [17, 0]):
        with pytest.raises(ConfigError, match="of 19 tokens the last one, 18, must begin"):
            foreign_marks(pair, 19)
