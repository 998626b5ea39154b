"""Training program on the stand-in: options, evaluation, checkpoints and a sample.

Where it cannot run, its message names the reason.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from run_files import lines_of
from standin.install import installed

from minillm import evaluate, generate, train
from minillm.base import device as devices
from minillm.base.device import open_device
from minillm.base.errors import ConfigError
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve

OPTIONS = [
    "--device=cuda",
    "--layers=2",
    "--heads=2",
    "--dim=64",
    "--context=32",
    "--batch=8",
    "--microbatch=4",
    "--steps=6",
    "--warmup=1",
]
OPTIONS += [
    "--data=austen",
    "--eval-tokens=256",
    "--eval-every=4",
    "--save-every=3",
    "--sample-tokens=5",
    "--lr=0.01",
]


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with installed():
        status = train.main([*OPTIONS, *options])
    out = capsys.readouterr()
    assert status == 0, out.err
    return out.out


def lines(folder: Path) -> list[dict[str, Any]]:
    return lines_of(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_save_resume_evaluate_and_generate(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    text = " ".join(run(capsys, f"--dtype={dtype}", f"--out={whole}").split())
    assert "stand-in, device 0" in text and "--- a sample" in text and "held-out loss" in text
    run(capsys, f"--dtype={dtype}", f"--out={parts}", "--stop-after=3")
    run(capsys, f"--resume={parts}")
    run(
        capsys, f"--init-from={whole}", f"--dtype={dtype}", "--steps=2", f"--out={tmp_path / 'new'}"
    )
    started = [line["loss"] for line in lines(tmp_path / "new")]  # on the first batches of the run
    assert max(started) < lines(whole)[0]["loss"] - 0.1  # the second: masters, not initial values
    first, second = lines(whole), lines(parts)
    assert (
        [line["step"] for line in first] == [line["step"] for line in second] == list(range(1, 7))
    )
    assert [line["loss"] for line in first] == [line["loss"] for line in second], (
        "a resumed run goes on bit for bit"
    )
    assert first[3]["val_loss"] == second[3]["val_loss"] and "peak_device_mb" in first[0]
    assert first[-1]["loss"] < first[0]["loss"]
    # Elsewhere the checkpoint is a model in float32, as evaluated on the CPU.
    assert evaluate.main([f"--checkpoint={whole}", "--tokens=256"]) == 0
    found = json.loads(capsys.readouterr().out)
    held_out = first[-1]["val_loss"]
    assert f"result held-out loss {held_out:#.4g}, " in text
    assert found["loss"] == pytest.approx(held_out, rel=1e-5 if dtype == "float32" else 5e-3)
    with installed() as gpu, gpu.counting() as events:
        assert evaluate.main([f"--checkpoint={whole}", "--tokens=256", "--device=cuda"]) == 0
    assert [what for what, _ in events].count("download") == 1, "the loss comes down, once"
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(held_out, rel=1e-5), (
        "on the device, the dtype is that of training"
    )


def test_a_checkpoint_that_is_written_behind_is_a_copy_of_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for word in ("--no-save-async", "--save-async"):
        folder = tmp_path / word
        run(capsys, "--dtype=bfloat16", f"--out={folder}", word, "--keep=9", "--sample-tokens=0")
        files = sorted((folder / "checkpoints").rglob("*.safetensors"))
        found.append({file.parent.name: file.read_bytes() for file in files})
    assert len(found[0]) == 2 and found[0] == found[1]


@pytest.mark.parametrize("how", [["--temperature=0"], ["--temperature=1", "--seed=3"]])
def test_the_device_writes_the_text_of_the_cpu(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "--dtype=float32", f"--out={tmp_path / 'run'}")
    options = [
        f"--checkpoint={tmp_path / 'run'}",
        "--tokens=50",
        "--prompt=She ",
        "--window",
        *how,
    ]  # past the context of 32
    assert generate.main(options) == 0
    want = capsys.readouterr().out
    with installed() as gpu, gpu.counting() as events:
        assert generate.main([*options, "--device=cuda"]) == 0
    assert capsys.readouterr().out == want and len(want) > 50
    assert sum(what == "download" for what, _ in events) == 50, (
        "the logits of each token come down, and nothing else"
    )
    if how == ["--temperature=0"]:
        assert generate.main([*options, "--device=cuda"]) == 1  # where there is no GPU
        assert re.search("no GPU|needs CuPy", capsys.readouterr().err)


def test_a_step_that_is_not_finite_ends_the_run_with_the_weights_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed():
        status = train.main(
            [
                *OPTIONS,
                "--dtype=bfloat16",
                f"--out={tmp_path / 'run'}",
                "--lr=1e30",
                "--clip=0",
                "--eval-every=0",
            ]
        )
    out = capsys.readouterr()
    assert status == 1 and re.search(r"step \d: the loss is (nan|inf)", out.err), out.err
    before = int(re.findall(r"step (\d): the loss", out.err)[0]) - 1
    assert (tmp_path / "run" / "checkpoints" / f"left-step-{before:08d}").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="bfloat16"), "bfloat16 needs --device cuda"),
        (dict(device="cuda", dtype="float64"), "float64 needs --device cpu"),
        (dict(device="cuda", node_shared="on"), "node-shared on needs --device cpu"),
        (
            dict(device="cuda", dim=120, heads=4),
            "attention's CUDA kernels are for heads of 32, 64, 96 or 128; use a --dim that",
        ),
        (
            dict(device="cuda", dim=128, heads=8),
            "= 16, and attention's CUDA kernels .* use --heads 4 or 2 or 1|use --heads 1, 2 or 4",
        ),
        (dict(device="cuda", dim=16384, heads=128), "16384 is more than the 8192 channels"),
    ],
)
def test_what_the_kernels_cannot_do_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(RunConfig.from_dict(options), 1, 100)


def test_activations_that_do_not_fit_are_named_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed():
        assert (
            train.main(
                [
                    *OPTIONS,
                    f"--out={tmp_path / 'run'}",
                    "--layers=200",
                    "--context=4096",
                    "--recompute=none",
                ]
            )
            == 1
        )
    assert re.search(
        r"the run needs 1\d\.\d GB of memory \(.*\), but stand-in, device 0 has [\d.]+ GB; use "
        r"--recompute full --microbatch 2",
        capsys.readouterr().err,
    )


def test_the_arena_is_one_piece_that_arrays_are_cut_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed() as cupy:
        device, pool, mb = open_device("cuda"), cupy.get_default_memory_pool(), 1 << 20
        pool.free_all_blocks()
        monkeypatch.setattr(pool, "limit", pool.used_bytes() + 100 * mb)
        kept = cupy.zeros(10 * mb, np.uint8)
        garbage = [cupy.zeros(10 * mb, np.uint8) for _ in range(7)]
        del garbage
        assert cupy.cuda.runtime.memGetInfo()[0] == 20 * mb
        device.reserve(60 * mb)  # more than the driver has left while the pool keeps what was freed
        assert pool.total_bytes() == device.peak_bytes() == pool.used_bytes() + 60 * mb
        more = cupy.zeros(50 * mb, np.uint8)
        assert pool.total_bytes() == pool.used_bytes() + 10 * mb, "cut from the arena"
        with pytest.raises(
            ConfigError,
            match=r"need about 0\.1 GB, and stand-in, device 0 has 0\.0 of its 2\.1 GB free; use a "
            r"smaller",
        ):
            device.reserve(60 * mb)
        del kept, more


def _cupy(error: Exception | None, driver: int = 0, count: int = 0) -> Any:
    def devices_or_error() -> int:
        if error is not None:
            raise error
        return count

    return SimpleNamespace(
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(
                getDeviceCount=devices_or_error,
                driverGetVersion=lambda: driver,
                runtimeGetVersion=lambda: 13020,
            )
        )
    )


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, r"needs CuPy .*pip install -e '\.\[cuda13\]'.*--device cpu"),
        (
            _cupy(RuntimeError("cudaErrorInsufficientDriver: ...")),
            "no GPU: this machine has no NVIDIA device or no driver.*--device cpu",
        ),
        (
            _cupy(RuntimeError("cudaErrorInsufficientDriver: ..."), 12040),
            r"supports CUDA 12\.4 and .* for CUDA 13; update the driver to 580",
        ),
        (_cupy(RuntimeError("cudaErrorNoDevice: no CUDA-capable device"), 13000), "no GPU"),
        (
            _cupy(RuntimeError("cudaErrorUnknown: unknown error")),
            r"cannot start \(cudaErrorUnknown.*minillm doctor",
        ),
        (_cupy(None), "CUDA sees no GPU; check CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_missing_is_named(cupy: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if cupy is None:
            raise ImportError("No module named 'cupy'")
        return cupy

    monkeypatch.setattr(devices.importlib, "import_module", load)
    with pytest.raises(ConfigError, match=message):
        devices.open_device("cuda")
