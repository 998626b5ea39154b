"""Encoders of transformers give its logits and gradients, and come back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders as tiny
import tiny_models
from safetensors.numpy import load_file, save_file
from test_exporting import bits, export
from test_transformers import refused
from training_helpers import Layout
from weights_helpers import Gradients, loaded, weights_on

import minillm
from minillm.autograd.backward import backward
from minillm.base.errors import ConfigError
from minillm.layout.sharding import slice_shape
from minillm.models import bert
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.weights import exporting, hf, importing
from minillm.weights.foreign import Foreign
from minillm.weights.mapping import write_block

ENCODERS = [case for case in tiny.CASES if case != "marian"]


def folder(path: Path, case: str, dtype: Any = np.float64, **changes: Any) -> Path:
    """Write a case as transformers saves it. `changes` replace keys of config.json."""
    path.mkdir(parents=True, exist_ok=True)
    wanted = tiny.recorded(case)
    tensors = {
        name: tiny_models.tensor(name, tuple(shape)).astype(dtype)
        for name, shape in wanted["shapes"].items()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(wanted["config"] | changes))
    return path


def batch_of(shape: Any, pad: int) -> Batch:
    """Return the inputs of the recorded cases, with the losses that the model has."""
    arrays = dict(
        tokens=tiny.tokens(pad),
        types=tiny.types(shape.types),
        masked=np.array(tiny.PLACES),
        originals=tiny.originals(),
        unrelated=tiny.UNRELATED,
    )
    divisors = {"mlm": float(len(tiny.PLACES))} if shape.tied else {}
    divisors |= {"nsp": 2.0} if shape.pairs else {}
    where = Where(0, np.arange(2), np.arange(tiny.LENGTH))
    return Batch(arrays, divisors, where, KeyLimits(np.array(tiny.LENGTHS)))


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return results as recorded, and gradients by foreign names, of an encoder in `path`."""
    heads: list[np.ndarray] = []
    scores: Callable[..., Any] = bert.head_scores

    def watched(x: Any, weight: Any, *args: Any, **more: Any) -> Any:
        logits = x.data @ weight.get().T + more["bias"].get()
        heads.append(logits[:, : more["vocab"]])
        return scores(x, weight, *args, **more)

    monkeypatch.setattr(bert, "head_scores", watched)
    stage, foreign = loaded(path, tiny.LENGTH), Foreign(path)
    shape: Any = foreign.model
    batch = batch_of(shape, foreign.tensors.config.get("pad_token_id") or 0)
    stage.buffers.start_step()
    result = stage.model.forward((), batch, False)
    roots = [(loss, np.ones(())) for loss in result.losses.values()]
    found: dict[str, Any] = dict(zip(("logits", "classes"), heads, strict=False))
    hidden = result.outputs[0]
    if not roots:
        along = tiny_models.direction("hidden", hidden.shape)
        along[1, tiny.LENGTHS[1] :] = 0
        roots = [(hidden, along.astype(hidden.dtype))]
        found |= {"hidden": hidden.data[:, ::4], "loss": float((hidden.data * along).sum())}
    else:
        found["loss"] = sum(float(loss.data) for loss, _ in roots)
    backward(roots)
    written = [p for p in stage.buffers.parameters if p.slot().writes]
    source: Any = Gradients({p.name: p.slot().buf for p in written})
    gradients = {
        link.theirs: write_block(source, link, slice(0, link.their_shape[0]))
        for link in foreign.links
        if link.ours in source.values
    }
    return found, gradients


@pytest.mark.parametrize("case", ENCODERS)
def test_logits_and_gradients_are_those_of_transformers(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, gradients = run(folder(tmp_path / "m", case), monkeypatch)
    wanted = tiny.recorded(case)
    assert found.keys() == wanted.keys() - {"config", "shapes", "gradients"}
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-12)
    assert gradients.keys() == wanted["gradients"].keys()
    for name, gradient in gradients.items():
        along = tiny.along(name, gradient)
        assert abs(along - wanted["gradients"][name]) <= 1e-12, name


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert-bare"])
def test_float32_files_give_the_same_to_rounding(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = run(folder(tmp_path / "m", case, np.float32), monkeypatch)
    for name, value in found.items():
        np.testing.assert_allclose(value, tiny.recorded(case)[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", list(tiny.CASES))
def test_bits_names_and_configuration_come_back(case: str, tmp_path: Path) -> None:
    """Through a run, and out in float32 as `save_pretrained` writes."""
    source = folder(tmp_path / "m", case, np.float32)
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    before, after = Foreign(source), Foreign(tmp_path / "back")
    assert after.model == before.model
    saved, written = before.tensors.config, after.tensors.config
    if case != "xlm-roberta":  # the same layout as RoBERTa, which is the first that fits
        assert written["architectures"] == saved["architectures"]
    differing = {
        name
        for name in written.keys() & saved.keys()
        if (written[name] != saved[name] and name not in ("eos_token_id", "bos_token_id", "dtype"))
        or (case == "marian" and written["eos_token_id"] != 0)
    }
    assert differing <= {"architectures", "model_type"} and (not differing or "xlm" in case)


GGUFS = {"bert": "head and pairs", "bert-bare": "pairs", "distilbert": "head", "bert-mlm": "head"}


@pytest.mark.parametrize("case", [*GGUFS, "bert-bare-unpooled", "distilbert-bare"])
def test_gguf_files_hold_the_encoder_alone(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leave out what llama.cpp has no place for, and say so."""
    source, file = folder(tmp_path / "m", case, np.float32), tmp_path / "m.gguf"
    export(source, "--out", file, "--format", "gguf")
    said = capsys.readouterr().out
    if case in GGUFS:
        assert f"the format has no place for its {GGUFS[case]}" in said
    found, wanted = values(file), values(source)
    assert found.keys() < wanted.keys() or "bare" in case
    assert all(np.array_equal(value, wanted[name]) for name, value in found.items())
    assert {name.split(".")[0] for name in wanted.keys() - found.keys()} == {
        f"model/{part}" for part in GGUFS.get(case, "").split(" and ") if part
    }
    export(file, "--out", tmp_path / "back")
    kept = {name.removeprefix("bert.").removeprefix("distilbert."): each
            for name, each in bits(source).items()}  # fmt: skip
    back = bits(tmp_path / "back")
    assert back.items() <= kept.items() and len(back) == len(Foreign(file).links)


def test_a_gguf_of_roberta_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "m", "roberta", np.float32)
    words = [str(source), "--out", str(tmp_path / "m.gguf"), "--format", "gguf"]
    assert exporting.main(words) == 1
    assert "GGUF has no architecture for roberta models" in "".join(capsys.readouterr())
    assert not (tmp_path / "m.gguf").exists()


def values(path: Path) -> dict[str, np.ndarray]:
    """Return the parameters that foreign weights give."""
    source = Foreign(path).source()
    return {
        name: source.read(name, tuple(slice(0, size) for size in source.shape(name)))
        for name in source.names()
    }


def test_old_names_and_copies(tmp_path: Path) -> None:
    """LayerNorm.gamma, position ids, and both names of what the head shares."""
    path = folder(tmp_path / "m", "bert", np.float32)
    held = load_file(path / "model.safetensors")
    wanted = values(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in held.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(16)[None]
    old["cls.predictions.decoder.weight"] = held["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    save_file(old, path / "model.safetensors")
    found = values(path)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name])
    old["cls.predictions.decoder.weight"] = old["cls.predictions.decoder.weight"] + 1
    save_file(old, path / "model.safetensors")
    assert "decoder.weight differs from bert.embeddings.word_embeddings" in refused(path)


@pytest.mark.parametrize(
    ("case", "layout"),
    [("bert", Layout(tp=2, pp=2)), ("bert", Layout(dp=3)), ("marian", Layout(tp=2, pp=3))],
    ids=str,
)
def test_every_mesh_reads_its_slices(
    case: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read a vocabulary of 19, padded over tp with its bias, and segments of queries and keys."""
    source = folder(tmp_path / "m", case, np.float32)
    wanted, parts = values(source), []
    read = hf.Folder.read
    monkeypatch.setattr(
        hf.Folder, "read", lambda self, name, s: parts.append((name, s)) or read(self, name, s)
    )

    found = weights_on(source, layout)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name])
    if layout.tp == 2:
        up = "intermediate.dense.weight" if case == "bert" else "fc1.weight"
        assert {np.prod(slice_shape(s)) for name, s in parts if name.endswith(up)} == {40 // 2 * 24}


@pytest.mark.parametrize("kind", ["cls", "mean", "mean_sqrt_len_tokens"])
def test_how_a_model_embeds_comes_along(kind: str, tmp_path: Path) -> None:
    """Keep what sentence-transformers writes, through a run, a folder and a GGUF file."""
    source = folder(tmp_path / "m", "bert-bare", np.float32)
    (source / "1_Pooling").mkdir()
    modes = {"cls_token": "cls", "mean_tokens": "mean", "mean_sqrt_len_tokens": None}
    held = {f"pooling_mode_{name}": kind in (name, ours) for name, ours in modes.items()}
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"word_dimension": 24} | held))
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", "--out", tmp_path / "hf")
    export(tmp_path / "run", "--out", tmp_path / "m.gguf", "--format", "gguf")
    for path in (source, tmp_path / "hf"):
        assert Foreign(path).tokenizer["pooling"] == kind
    known = None if kind.endswith("tokens") else kind  # a number of llama.cpp
    assert Foreign(tmp_path / "m.gguf").tokenizer.get("pooling") == known
    loaded_run: Any = minillm.load(str(tmp_path / "run"))
    if known is None:
        with pytest.raises(ConfigError, match="pooling 'mean_sqrt_len_tokens' is not known"):
            loaded_run.embed(["1 2 3"])


def test_heads_of_other_tasks_are_refused_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "bert-bare", np.float32)
    held = load_file(path / "model.safetensors")
    held = {f"bert.{name}": value for name, value in held.items()}
    save_file(
        held | {"classifier.weight": np.ones((3, 24), np.float32)}, path / "model.safetensors"
    )
    assert "the model has no place for its classifier.weight" in refused(path)
    save_file(held, path / "model.safetensors")
    assert Foreign(path).counterpart.architecture == "BertModel"


CONFIGS = [
    ("bert", dict(hidden_act="gelu_new"), "hidden_act 'gelu_new' is not supported"),
    ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type"),
    ("bert", dict(tie_word_embeddings=False), "tie_word_embeddings False is not supported"),
    ("bert", dict(num_hidden_layers=1), "no place for its bert.encoder.layer.1."),
    ("bert-bare", dict(num_hidden_layers=3), "it has no encoder.layer.2."),
    ("roberta", dict(pad_token_id=0), "pad_token_id 0 is not supported; it can be 1"),
    ("bert", dict(type_vocab_size=0), "type_vocab_size 0 is not supported"),
    ("distilbert", dict(activation="relu"), "activation 'relu' is not supported"),
]


@pytest.mark.parametrize(("case", "change", "message"), CONFIGS, ids=lambda value: str(value)[:30])
def test_other_encoders_are_refused_by_name(
    case: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(folder(tmp_path / "m", case, np.float32, **change))
