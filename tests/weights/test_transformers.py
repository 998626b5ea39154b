"""Weights of transformers give its logits and gradients; and malformed folders give one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from weights_helpers import folder, run

from minillm import evaluate, generate, train
from minillm.base.errors import CheckpointError
from minillm.checkpoint import CheckpointSource
from minillm.weights import exporting, importing
from minillm.weights.foreign import Foreign

# What transformers rounds to float32 in a float64 model: RMS norms and angles.
TOLERANCES = {"gpt2": 1e-12, "gpt2-untied": 1e-12}


@pytest.mark.parametrize("case", list(tiny_models.CASES))
def test_logits_and_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    logits, loss, gradients = run(folder(tmp_path / "m", case))
    wanted, tolerance = tiny_models.recorded(case), TOLERANCES.get(case, 2e-6)
    np.testing.assert_allclose(logits[:, -2:], wanted["logits"], rtol=0, atol=tolerance)
    assert abs(loss - wanted["loss"]) <= tolerance
    assert gradients.keys() == wanted["gradients"].keys()
    for name, gradient in gradients.items():
        along = float((gradient * tiny_models.direction(name, gradient.shape)).sum())
        assert abs(along - wanted["gradients"][name]) <= 10 * tolerance, name


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_float32_files_give_the_same_to_rounding(case: str, tmp_path: Path) -> None:
    logits, loss, _ = run(folder(tmp_path / "m", case, np.float32))
    wanted = tiny_models.recorded(case)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[:, -2:], wanted["logits"], rtol=0, atol=1e-5)
    assert abs(loss - wanted["loss"]) <= 1e-5


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Foreign(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


CONFIGS = [
    (dict(model_type="opt"), "unknown model_type: 'opt'"),
    (dict(n_head=None), "n_head is missing"),
    (dict(n_experts=4), "not known for gpt2: n_experts 4"),
    (dict(activation_function="silu"), "activation_function 'silu' is not supported"),
    (dict(scale_attn_weights=False), "scale_attn_weights False is not supported"),
    (dict(n_embd="wide"), "must be of type int"),
    (dict(vocab_size=20), "shape (19, 24) instead of (20, 24)"),
    (dict(tie_word_embeddings=False), "has no lm_head.weight"),
    (dict(n_layer=1), "the model has no place for its transformer.h.1."),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=lambda value: str(value)[:30])
def test_other_models_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(folder(tmp_path / "m", "gpt2", np.float32, **change))


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "gpt2", np.float32)
    file, config = path / "model.safetensors", path / "config.json"
    whole = file.read_bytes()
    for raw in (whole[:-5], whole[:20], b"", b"\xff" * 50, whole[:8] + b"?" + whole[9:]):
        file.write_bytes(raw)
        assert "model.safetensors is truncated, or no safetensors file" in refused(path)
    file.write_bytes(whole.replace(b'"F32"', b'"F99"', 1))
    assert "as F99" in refused(path)
    file.unlink()
    assert "has neither model.safetensors nor" in refused(path)
    (path / "pytorch_model.bin").touch()
    assert f"from_pretrained('{path}').save_pretrained" in refused(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../b"}}))
    assert "puts a into '../b'" in refused(path)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert "model.safetensors cannot be read: No such file" in refused(path)
    file.write_bytes(whole)
    assert "disagree about a" in refused(path)
    config.write_text("[]")
    assert "config.json holds a list" in refused(path)
    config.write_text("{")
    assert "config.json is no JSON text" in refused(path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_named(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "m", "llama", np.float32)
    held, name = load_file(path / "model.safetensors"), "model.layers.1.self_attn.k_proj.weight"
    held[name][-1, -1] = value
    save_file(held, path / "model.safetensors")
    for program, more in (
        (importing, ["--out", str(tmp_path / "run")]),
        (exporting, ["--out", str(tmp_path / "out")]),
        (generate, ["--prompt", "1 2", "--tokens", "2"]),
    ):
        assert program.main([str(path), *more]) == 1
        assert f"{path}: its {name} holds values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_path_without_weights_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (("none", "does not exist"), ("", "holds no weights")):
        assert importing.main([str(tmp_path / name), "--out", str(tmp_path / "run")]) == 1
        assert f"{tmp_path / name} {words}".replace("/ ", " ") in capsys.readouterr().err


def test_a_second_head_must_equal_the_embedding(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "gpt2", np.float32)
    held = load_file(path / "model.safetensors")
    save_file(held | {"lm_head.weight": held["transformer.wte.weight"]}, path / "model.safetensors")
    assert "head" not in Foreign(path).specs
    other = held["transformer.wte.weight"] + 1e-3
    save_file(held | {"lm_head.weight": other}, path / "model.safetensors")
    assert "lm_head.weight differs from" in refused(path)


def test_names_without_the_prefix_and_buffers_of_old_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "gpt2", np.float32)
    held = load_file(path / "model.safetensors")
    wanted = Foreign(path).source().read("model/positions", (slice(2, 5), slice(0, 24)))
    held = {name.removeprefix("transformer."): value for name, value in held.items()}
    save_file(held | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}, path / "model.safetensors")
    found = Foreign(path).source().read("model/positions", (slice(2, 5), slice(0, 24)))
    np.testing.assert_array_equal(found, wanted)


def test_a_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "gpt2", np.float32)
    large = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 40, "content": "b"}]}
    (path / "tokenizer.json").write_text(json.dumps(large))
    assert "tokenizer.json has 41 tokens, but the model has 19" in refused(path)
    (path / "tokenizer.json").write_text("{}")
    assert "no model.vocab" in refused(path)


@pytest.mark.slow
def test_weights_have_no_state_and_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(folder(tmp_path / "m", "gpt2", np.float32))
    for program, words, message in (
        (train, ["--resume", path], f"start one from them with --init-from {path}"),
        (train, ["--init-from", path, "--best"], "--best chooses among the checkpoints"),
        (train, ["--init-from", path, "--layers", "3"], "cannot change --layers 3 (was 2)"),
        (evaluate, [path], "name some with --data"),
        (evaluate, [path, "--data", path, "--context", "17"], "longer than the 16 positions"),
        (importing, [str(tmp_path), "--out", str(tmp_path / "r")], "holds no weights"),
        (exporting, [path, "--out", str(tmp_path / "r"), "--dtype", "q8_0"], "is not written with"),
    ):
        assert program.main(words) in (1, 2)
        assert message in "".join(capsys.readouterr())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_run_starts_from_weights(tmp_path: Path) -> None:
    source, text = folder(tmp_path / "m", "llama", np.float32), tmp_path / "ids.bin"
    np.random.default_rng(3).integers(0, 19, 3000).astype(np.uint16).tofile(text)
    words = ["--init-from", str(source), "--data", str(text), "--context", "8", "--batch", "2"]
    words += ["--steps", "1", "--lr", "1e-30", "--sample-tokens", "0", "--out", str(tmp_path / "r")]
    assert train.main(words) == 0
    path = tmp_path / "r" / "checkpoints" / "step-00000001"
    before, after = Foreign(source).source(), CheckpointSource(path)
    for name in before.names():
        every = tuple(slice(0, n) for n in before.shape(name))
        np.testing.assert_allclose(after.read(name, every), before.read(name, every), rtol=1e-6)
