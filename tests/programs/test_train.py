"""Runs of `minillm.train`: the files that they leave, and resumption.

A stopped and resumed run is the uninterrupted one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi_helpers import mpirun, mpirun_calls, needs_mpirun
from run_files import lines_of

from minillm import checkpoint, train

TRAIN = ["-m", "minillm.train"]


def hashes(run: Path, step: int) -> dict[str, str]:
    """Return the checksum of each file of the run's checkpoint at `step`."""
    manifest = checkpoint.read_manifest(run / "checkpoints" / f"step-{step:08d}")
    return {name: entry.sha256 for name, entry in manifest.files.items()}


@needs_mpirun
def test_stopped_and_resumed_equals_uninterrupted(tiny: list[str], tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = [*tiny, "--dropout", "0.1"]
    assert mpirun(2, [*TRAIN, *options, "--out", str(whole)]).returncode == 0
    assert mpirun(2, [*TRAIN, *options, "--out", str(halves), "--stop-after", "3"]).returncode == 0
    resumed = mpirun(2, [*TRAIN, "--resume", str(halves)])
    assert resumed.returncode == 0 and "to rounding" not in resumed.output
    assert hashes(whole, 6) == hashes(halves, 6)
    assert [line["loss"] for line in lines_of(whole)] == [line["loss"] for line in lines_of(halves)]


@needs_mpirun
def test_resumed_on_another_mesh_says_so_and_agrees_to_rounding(
    tiny: list[str], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert mpirun(2, [*TRAIN, *tiny, "--out", str(whole)]).returncode == 0
    assert mpirun(2, [*TRAIN, *tiny, "--out", str(halves), "--stop-after", "3"]).returncode == 0
    resumed = mpirun(2, [*TRAIN, "--resume", str(halves), "--tp", "2"])
    assert (
        resumed.returncode == 0
        and resumed.output.count("results continue to rounding, not bit for bit") == 1
    )
    losses = [[line["loss"] for line in lines_of(run)] for run in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@needs_mpirun
@pytest.mark.slow
def test_metrics_trace_and_checks(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = mpirun(
        4,
        [
            *TRAIN,
            *tiny,
            "--tp",
            "2",
            "--trace",
            "--check-order",
            "--check-every",
            "2",
            "--eval-every",
            "3",
        ],
    )
    assert found.returncode == 0, found.output
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "seconds",
        "tokens_per_second",
        "comm",
        "peak_rss_mb",
    }
    assert all(wanted <= set(line) for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert lines[0]["tokens"] == 8 * 16 and lines[0]["comm"]["tp"]["all_reduce"]["bytes"] > 0
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    tracks = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert tracks >= {(rank, track) for rank in range(4) for track in (0, 1)}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


@needs_mpirun
def test_every_layout_reports_the_same_loss(tiny: list[str], tmp_path: Path) -> None:
    layouts = {"one": (0, []), "dp": (2, []), "tp": (2, ["--tp", "2"]), "pp": (2, ["--pp", "2"])}
    losses = {}
    for name, (ranks, options) in layouts.items():
        assert (
            mpirun(
                ranks,
                [*TRAIN, *tiny, *options, "--dtype", "float64", "--out", str(tmp_path / name)],
            ).returncode
            == 0
        )
        losses[name] = [line["loss"] for line in lines_of(tmp_path / name)]
    assert all(found == pytest.approx(losses["one"], rel=1e-10) for found in losses.values())


@needs_mpirun
def test_evaluate_and_generate_on_any_mesh(tiny: list[str], tmp_path: Path) -> None:
    run = ["--checkpoint", str(tmp_path / "run")]

    def calls(*layout: str) -> list[list[str]]:
        prompt = ["--prompt", "line", "--tokens", "30"]
        return [
            ["minillm.evaluate", *run, *layout],
            ["minillm.generate", *run, *layout, *prompt],
        ]

    train_it = ["minillm.train", *tiny, "--tokenizer", "char"]
    trained, *alone = mpirun_calls(0, [train_it, *calls()])
    assert trained.returncode == 0, trained.output
    found = [*alone, *mpirun_calls(2, [*calls("--tp", "2"), *calls("--pp", "2")])]
    assert all(done.returncode == 0 for done in found), found
    measured = [json.loads(done.output) for done in found[::2]]
    written = [done.output for done in found[1::2]]
    assert written[0].startswith("line")
    assert set(measured[0]) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert all(found["loss"] == pytest.approx(measured[0]["loss"], rel=1e-5) for found in measured)
    assert len(set(written)) == 1


@pytest.mark.parametrize("source", ["austen", "file"])
def test_the_sample_continues_words_of_the_text(
    source: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = "It is a truth universally acknowledged, that "
    if source == "file":  # of others the first eight bytes of the last tenth
        whole, source = text.read_text(), str(text)
        begin = whole[len(whole) - len(whole) // 10 :][:8]
    sizes = ["--layers=1", "--heads=1", "--dim=8", "--context=16", "--batch=1", "--steps=1"]
    options = [f"--data={source}", "--sample-tokens=3", f"--out={tmp_path / 'run'}"]
    assert train.main([*sizes, *options]) == 0
    sample = capsys.readouterr().out.partition("its beginning given ---\n")[2]
    assert sample.startswith(begin) and sample.endswith("\n---\n")
