"""GGUF files: number formats, metadata, and agreement with the packages gguf and xllamacpp."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from weights_helpers import folder, run

from minillm.base.errors import CheckpointError, ConfigError
from minillm.weights import exporting
from minillm.weights.foreign import Foreign
from minillm.weights.ggml import BY_NAME
from minillm.weights.gguf_file import GGUFFile, write
from minillm.weights.tokenizer_json import from_gguf, to_gguf
from minillm.weights.turns import of_gguf


def blocks(name: str, count: int = 50) -> np.ndarray:
    """Return bytes of blocks [count, num_bytes] with finite scales."""
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, (count, BY_NAME[name].num_bytes), dtype=np.uint8)
    scales = rng.standard_normal((count, 2)).astype(np.float16).view(np.uint8)
    raw[:, :4] = scales
    return raw


def plain(name: str, raw: bytes) -> list[float]:
    """Return the values of a block, one by one as ggml-common.h lays it out."""
    scale = struct.unpack("<e", raw[:2])[0]
    if name == "Q8_0":
        return [scale * number for number in struct.unpack("<32b", raw[2:])]
    low, first = (-8 * scale, 2) if name == "Q4_0" else (struct.unpack("<e", raw[2:4])[0], 4)
    numbers = [raw[first + i] & 15 for i in range(16)] + [raw[first + i] >> 4 for i in range(16)]
    return [scale * number + low for number in numbers]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_decoded(name: str) -> None:
    raw = blocks(name)
    found = BY_NAME[name].decode(raw)
    wanted = [plain(name, block.tobytes()) for block in raw]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    quants = pytest.importorskip("gguf.quants", reason="the package gguf is not installed")
    kind = quants.GGMLQuantizationType[name]
    np.testing.assert_array_equal(found.reshape(len(raw), -1), quants.dequantize(raw, kind))


def test_eight_bits_are_within_half_a_step() -> None:
    x = np.random.default_rng(4).standard_normal((64, 32)).astype(np.float32)
    x[3] = 0
    form = BY_NAME["Q8_0"]
    assert form.encode is not None
    raw = form.encode(x)
    step = np.abs(x).max(1, keepdims=True) / 127
    assert (np.abs(form.decode(raw) - x) <= 0.51 * step + 127 * step * 2.0**-11).all()
    quants = pytest.importorskip("gguf.quants", reason="the package gguf is not installed")
    np.testing.assert_array_equal(raw, quants.quantize(x, quants.GGMLQuantizationType.Q8_0))


def test_slices_of_blocks(tmp_path: Path) -> None:
    x = np.random.default_rng(5).standard_normal((6, 96)).astype(np.float32)
    form = BY_NAME["Q8_0"]
    write(tmp_path / "x", {"a": 1}, {"t": (form, x.shape)}, [x[:4], x[4:]])
    assert form.encode is not None
    whole = form.decode(form.encode(x.reshape(6, 3, 32))).reshape(6, 96)
    file = GGUFFile(tmp_path / "x")
    for rows, columns in ((slice(0, 6), slice(0, 96)), (slice(2, 5), slice(31, 65))):
        np.testing.assert_array_equal(file.read("t", (rows, columns)), whole[rows, columns])


def test_metadata_come_back(tmp_path: Path) -> None:
    values = {
        "text": "é\n",
        "whole": 7,
        "real": 0.5,
        "yes": True,
        "texts": ["a", ""],
        "none": [],
        "numbers": [1, -2],
    }
    write(tmp_path / "x", values, {}, [])
    assert GGUFFile(tmp_path / "x").metadata == values


def exported(tmp_path: Path, case: str, *words: str) -> Path:
    source, out = folder(tmp_path / case, case, np.float32), tmp_path / f"{case}.gguf"
    assert exporting.main([str(source), "--out", str(out), "--format", "gguf", *words]) == 0
    return out


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    reader = gguf.GGUFReader(exported(tmp_path, "gpt2"))
    held = {tensor.name: tensor for tensor in reader.tensors}
    shapes = tiny_models.recorded("gpt2")["shapes"]
    assert len(held) == len(shapes)
    fused = tiny_models.tensor("transformer.h.1.attn.c_attn.weight", (24, 72))
    np.testing.assert_array_equal(held["blk.1.attn_qkv.weight"].data, fused.T.astype(np.float32))
    assert reader.get_field("gpt2.attention.head_count").contents() == 4
    reader = gguf.GGUFReader(exported(tmp_path, "llama"))
    held = {tensor.name: tensor for tensor in reader.tensors}
    keys = tiny_models.tensor("model.layers.0.self_attn.k_proj.weight", (16, 24))
    pairs = keys.reshape(2, 2, 4, 24).swapaxes(1, 2).reshape(16, 24)  # 2 heads 8 wide
    np.testing.assert_array_equal(held["blk.0.attn_k.weight"].data, pairs.astype(np.float32))
    assert reader.get_field("llama.attention.key_length").contents() == 8


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path, form = tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q4_0
    x = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32)
    raw = gguf.quants.quantize(x, form)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("t", raw, raw_dtype=form)
    writer.add_tensor("half", x.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.metadata["llama.block_count"] == 3
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    every = (slice(0, 4), slice(0, 64))
    np.testing.assert_array_equal(file.read("t", every), gguf.quants.dequantize(raw, form))
    np.testing.assert_array_equal(file.read("half", every), x.astype(np.float16))


def test_a_whole_model_keeps_its_logits(tmp_path: Path) -> None:
    wanted = np.array(tiny_models.recorded("qwen3")["logits"])
    logits, _, _ = run(exported(tmp_path, "qwen3"))
    np.testing.assert_allclose(logits[:, -2:], wanted, rtol=0, atol=1e-5)


def test_damaged_and_unknown_files_are_refused_by_name(tmp_path: Path) -> None:
    whole = exported(tmp_path, "llama").read_bytes()

    def refused(raw: bytes) -> str:
        (tmp_path / "bad.gguf").write_bytes(raw)
        with pytest.raises(CheckpointError) as caught:
            Foreign(tmp_path / "bad.gguf")
        return str(caught.value)

    assert "is truncated" in refused(whole[:100])
    assert "ends at byte" in refused(whole[:-64])
    assert "does not begin with GGUF" in refused(b"GGML" + whole[4:])
    assert "its version is 9" in refused(whole[:4] + struct.pack("<I", 9) + whole[8:])
    assert "its general.architecture is 'lxama'" in refused(whole.replace(b"llama", b"lxama"))
    name = b"blk.0.attn_k.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8
    assert "its blk.0.attn_k.weight is Q4_K" in refused(
        whole[:at] + struct.pack("<I", 12) + whole[at + 4 :]
    )
    assert "has no blk.0.attn_k.weight" in refused(whole.replace(name, b"blk.0.attn_x.weight"))
    assert "llama.expert_cnt 19 is not" in refused(whole.replace(b"vocab_size", b"expert_cnt"))
    deep = struct.pack("<II", 9, 9) + struct.pack("<QI", 1, 9) * 3000
    many = whole[:16] + struct.pack("<Q", 1) + struct.pack("<Q", 1) + b"x" + deep
    assert "is truncated, or no GGUF file" in refused(many)


WRONG: list[tuple[str, Any]] = [
    ("tokens", 3),
    ("tokens", [1, 2, 3]),
    ("token_type", 0.5),
    ("token_type", ["1", "2", "3"]),
    ("token_type", [1, 1]),
    ("merges", [1, 2]),
    ("pre", [1]),
    ("unknown_token_id", 9),
    ("unknown_token_id", "a"),
]
ABSENT = {"gpt2": ["unknown_token_id"], "bert": ["merges", "pre"]}  # keys that a model lacks


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [(model, *wrong) for model in ABSENT for wrong in WRONG if wrong[0] not in ABSENT[model]],
)
def test_a_tokenizer_of_wrong_types_is_one_error(model: str, name: str, value: Any) -> None:
    whole = {"tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"], "pre": "gpt-2"}
    held = {f"tokenizer.ggml.{key}": v for key, v in (whole | {name: value}).items()}
    with pytest.raises(CheckpointError, match=r"^it(s| has) "):
        from_gguf({"tokenizer.ggml.model": model, **held})
    assert of_gguf({"tokenizer.ggml.eos_token_id": 1, **held}) == {"ends": [1]}


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0}, "merges": [0.5]},
        {"type": "BPE", "vocab": {"a": 7}, "merges": []},
        {"type": "BPE", "vocab": {"a": "0"}, "merges": []},
        {"type": "BPE", "vocab": 3, "merges": []},
        {"type": "BPE"},
    ],
    ids=str,
)
def test_a_damaged_tokenizer_is_not_exported(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"its tokenizer\.json is damaged"):
        to_gguf({"model": model}, 1)
