"""Further places for the metrics: their contents, their packages, and their failures."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_files import lines_of

from minillm import train
from minillm.base.errors import ConfigError
from minillm.training import writers
from minillm.training.options import OutputOptions
from minillm.training.writers import PLACES, Opened, Place, Start, Writers, check_packages

LINE = {"step": 3, "loss": 2.5, "val_loss": 2.25, "comm": {"dp": {"all_reduce": {"bytes": 8}}}}
FLAT = {"step": 3, "loss": 2.5, "val_loss": 2.25, "comm/dp/all_reduce/bytes": 8}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_numbers_of_the_metrics_and_a_continuation_replaces_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    small = ["--layers=1", "--heads=1", "--dim=16", "--context=8", "--batch=2", "--data=austen"]
    options = [*small, "--sample-tokens=0", "--eval-every=2", "--eval-tokens=8", f"--out={out}"]
    assert train.main([*options, "--steps=4", "--stop-after=2", "--log-to=csv"]) == 0
    assert train.main([f"--resume={out}"]) == 0
    wanted = lines_of(out)
    found = rows(out / "metrics.csv")
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    for line, row in zip(wanted, found, strict=True):
        for name in ("loss", "grad_norm", "lr", "seconds", "peak_rss_mb"):
            assert float(row[name]) == line[name]
        assert row["val_loss"] == str(line.get("val_loss", ""))
    start = Start(out, {}, first_step=3)
    again = Writers(["csv"], start, print)
    again.write({"step": 4, "loss": 1.5})
    again.close()
    assert [(row["step"], row["loss"]) for row in rows(out / "metrics.csv")[2:]] == [
        ("3", str(wanted[2]["loss"])),
        ("4", "1.5"),
    ]


def test_tensorboard_gets_each_number_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    package = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", package)  # type: ignore[arg-type]
    opened = Writers(["tensorboard"], Start(tmp_path, {}, 2), print)
    opened.write(LINE)
    opened.close()
    numbers = [(name, value, 3) for name, value in FLAT.items() if name != "step"]
    assert calls == [(str(tmp_path / "tensorboard"), 3), *numbers, "closed"]


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[Any] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(
            log=lambda numbers, step: logged.append((numbers, step)),
            finish=lambda: logged.append("finished"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    for _ in range(2):
        opened = Writers(["wandb"], Start(tmp_path, {"lr": 0.5}, 0), print)
        opened.write(LINE)
        opened.close()
    assert begun[0] == begun[1] and begun[0]["config"] == {"lr": 0.5}
    assert begun[0]["resume"] == "allow" and len(begun[0]["id"]) == 16
    assert logged == [(FLAT, 3), "finished"] * 2


def test_a_place_that_fails_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    said: list[str] = []

    def full(step: int, numbers: Any) -> None:
        raise OSError(28, "No space left on device")

    broken = Place(lambda start: Opened(full, lambda: None), None)
    fine = Place(lambda start: Opened(lambda step, n: written.append(step), lambda: None), None)
    monkeypatch.setattr(writers, "PLACES", {"broken": broken, "fine": fine})
    opened = Writers(["broken", "fine"], Start(tmp_path, {}, 0), said.append)
    for step in (1, 2):
        opened.write({"step": step})
    assert written == [1, 2]
    assert said == ["--log-to broken ended at step 1: OSError: [Errno 28] No space left on device"]


def test_unknown_places_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'tensorbord'; did you mean tensorboard"):
        OutputOptions(log_to="csv,tensorbord")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package wandb; .*minillm-mpi\[wandb\]"):
        check_packages(["csv", "wandb"])
    with pytest.raises(ConfigError, match="--log-to wandb cannot be opened: "):
        Writers(["wandb"], Start(Path(), {}, 0), print)


def test_every_place_with_a_package_has_an_extra() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, place in PLACES.items():
        if place.package is not None:
            assert project["optional-dependencies"][name][0].startswith(place.package + ">=")
