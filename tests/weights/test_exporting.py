"""Exports of any mesh: the same bits come back, the parts of a model that was cut included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file
from training_helpers import Layout, make_config
from weights_helpers import bpe_definition, folder, weights_on

from minillm import checkpoint
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.sharding import slice_shape
from minillm.weights import exporting, hf, importing
from minillm.weights.foreign import Foreign


def export(*words: object) -> None:
    assert exporting.main([str(word) for word in words]) == 0


def bits(path: Path) -> dict[str, Any]:
    """Return the tensors of a folder, as bytes."""
    held = {}
    for file in sorted(path.glob("*.safetensors")):
        held |= load_file(file)
    return {name: (data.dtype, data.shape, data.tobytes()) for name, data in held.items()}


@pytest.mark.parametrize("case", list(tiny_models.CASES))
def test_float32_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Through a run and as Hugging Face files; through GGUF where there is such an architecture."""
    source = folder(tmp_path / "m", case, np.float32)
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    foreign, before = Foreign(tmp_path / "back"), Foreign(source)
    assert foreign.counterpart is before.counterpart and foreign.model == before.model
    scaled = before.record.config["rope_scaling"] in ("llama3", "yarn")
    words = (source, "--out", tmp_path / "m.gguf", "--format", "gguf")
    if case == "mistral" or scaled:
        assert exporting.main([str(word) for word in words]) == 1
        assert not (tmp_path / "m.gguf").exists()
        return
    export(*words)
    export(tmp_path / "m.gguf", "--out", tmp_path / "again")
    assert bits(tmp_path / "again") == bits(source)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files_come_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", "qwen3", np.float32)
    export(source, "--out", tmp_path / "narrow", "--dtype", dtype)
    export(tmp_path / "narrow", "--out", tmp_path / "wide")
    export(tmp_path / "wide", "--out", tmp_path / "back", "--dtype", dtype)
    assert bits(tmp_path / "back") == bits(tmp_path / "narrow") != bits(source)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    for name, shape in tiny_models.recorded("qwen3")["shapes"].items():
        wanted = tiny_models.tensor(name, tuple(shape)).astype(np.float32)
        step = (
            np.abs(wanted) * (2.0**-11 if dtype == "float16" else 2.0**-8) + 2.0**-25
        )  # below it: float16 has steps of its own
        assert (np.abs(wide[name] - wanted) <= step).all(), name


LAYOUTS = [Layout(tp=2, pp=2), Layout(dp=2, tp=2), Layout(pp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_every_mesh_reads_its_slices(
    form: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read a vocabulary of 19, padded over tp, and rows of q and k in pairs (GGUF)."""
    source = folder(tmp_path / "m", "llama", np.float32)
    if form == "gguf":
        export(source, "--out", tmp_path / "m.gguf", "--format", "gguf")
        source = tmp_path / "m.gguf"
    whole, parts = Foreign(source), []
    read = whole.tensors.read
    monkeypatch.setattr(
        type(whole.tensors), "read", lambda self, name, s: parts.append((name, s)) or read(name, s)
    )

    found = weights_on(source, layout, context=8)
    monkeypatch.undo()
    for name, spec in whole.specs.items():
        wanted = whole.source().read(f"model/{name}", tuple(slice(0, n) for n in spec.shape))
        np.testing.assert_array_equal(found[f"model/{name}"], wanted)
    if layout.tp == 2:
        sizes = {np.prod(slice_shape(s)) for name, s in parts if "down" in name}
        assert sizes == {24 * 40 // 2}


def test_a_checkpoint_of_a_mesh_is_exported_without_its_padding(tmp_path: Path) -> None:
    layout = Layout(tp=2, pp=2)

    def rank(comm: Communicator) -> None:
        from checkpoint_helpers import TINY, new_trainer

        config = make_config(
            "llama", layout, **(TINY | dict(kv_heads=2, tied=True, dtype="float32"))
        )
        trainer = new_trainer(comm, config)
        record = checkpoint.RunRecord(
            config=config.saved_values(),
            tokenizer={"kind": "ids", "vocab_size": 29},
            vocab=29,
            corpus="0",
            source="numbers",
            key={},
        )
        checkpoint.save(
            tmp_path / "run",
            world=comm,
            mesh_shape=trainer.mesh.shape,
            coords=trainer.mesh.coords,
            tensors=trainer.state(),
            meta=record.to_json(),
            step=1,
            keep=1,
        )

    run_ranks(layout.num_ranks, rank)
    export(tmp_path / "run", "--out", tmp_path / "hf")
    source = checkpoint.CheckpointSource(tmp_path / "run" / "step-00000001")
    foreign = Foreign(tmp_path / "hf")
    assert set(foreign.source().names()) == {n for n in source.names() if n.startswith("model/")}
    for name in foreign.source().names():
        every = tuple(slice(0, n) for n in source.shape(name))
        np.testing.assert_array_equal(foreign.source().read(name, every), source.read(name, every))
    assert foreign.tensors.shape("model.embed_tokens.weight") == (29, 16)


def test_large_models_get_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "m", "gpt2", np.float32)
    monkeypatch.setattr(hf, "SHARD_BYTES", 12000)
    monkeypatch.setattr(hf, "CHUNK", 100)
    export(source, "--out", tmp_path / "shards")
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) == 6 and files[0] == "model-00001-of-00006.safetensors"
    assert all((tmp_path / "shards" / f).stat().st_size < 12000 + 1500 for f in files)
    index = json.loads((tmp_path / "shards" / hf.INDEX).read_text())
    total = sum(len(raw) for _, _, raw in bits(source).values())
    assert index["metadata"]["total_size"] == total and set(index["weight_map"].values()) == {
        *files
    }
    assert bits(tmp_path / "shards") == bits(source)
    export(tmp_path / "shards", "--out", tmp_path / "one")
    monkeypatch.undo()
    export(tmp_path / "one", "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    source = folder(tmp_path / "m", "smollm2", np.float32)
    (source / "tokenizer.json").write_text(json.dumps(bpe_definition()))
    export(source, "--out", tmp_path / "m.gguf", "--format", "gguf")
    export(tmp_path / "m.gguf", "--out", tmp_path / "hf")
    back = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert back == bpe_definition()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 18
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>" and settings["model_max_length"] == 32


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "m", "gpt2", np.float32)
    held = load_file(source / "model.safetensors")
    held["transformer.h.1.mlp.c_fc.bias"][3] = 1e9
    from safetensors.numpy import save_file

    save_file(held, source / "model.safetensors")
    for words in (("--dtype", "float16"), ("--format", "gguf", "--dtype", "float16")):
        status = exporting.main([str(source), "--out", str(tmp_path / "out"), *words])
        said = "".join(capsys.readouterr())
        if "gguf" in words:  # vectors stay float32 there
            assert status == 0
        else:
            assert status == 1 and "blocks.1.mlp.up.bias that float16 cannot" in said
            assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert exporting.main([str(source), "--out", str(tmp_path / "out")]) == 1
    assert "exists; name a new one" in "".join(capsys.readouterr())
