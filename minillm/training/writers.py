"""Further places for the metrics of a run: `--log-to csv`, `tensorboard` or `wandb`.

A writer is one function. It opens the place on rank 0 and returns what writes one line there.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minillm.base.errors import ConfigError
from minillm.base.record import known_name
from minillm.base.whole_file import replace

Numbers = Mapping[str, float]  # of one line of metrics.jsonl: comm/dp/all_reduce/bytes, loss, ...


class Start(NamedTuple):
    """Start of a run, as a writer needs it."""

    out: Path  # folder of the run
    config: Mapping[str, Any]  # flat, resolved
    first_step: int  # lines up to this step are written already


class Opened(NamedTuple):
    """Open place for metrics."""

    write: Callable[[int, Numbers], object]  # step (from 1), numbers
    close: Callable[[], object]


class Place(NamedTuple):
    """Kind of place: its function, and the package that it needs besides minillm's own."""

    open: Callable[[Start], Opened]
    package: str | None


def _open_csv(start: Start) -> Opened:
    """Open OUT/metrics.csv. Keeps the rows of an earlier part of the run."""
    path = start.out / "metrics.csv"
    kept: list[dict[str, Any]] = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(ValueError, TypeError):
                    if int(row["step"]) <= start.first_step:
                        kept.append(row)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        table = _table(file)
        table.writeheader()
        table.writerows(kept)
    replace(temporary, path)
    file = open(path, "a", newline="", encoding="utf-8", buffering=1)  # noqa: SIM115
    table = _table(file)
    return Opened(lambda step, numbers: table.writerow(numbers), file.close)


def _table(file: TextIO) -> csv.DictWriter[str]:
    return csv.DictWriter(file, CSV_COLUMNS, restval="", extrasaction="ignore")


CSV_COLUMNS = [
    *("step", "loss", "val_loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second"),
    *("exposed_seconds", "peak_rss_mb", "peak_device_mb"),
]


def _open_tensorboard(start: Start) -> Opened:
    """Open event files in OUT/tensorboard; `tensorboard --logdir runs` shows them."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(start.out / "tensorboard"), purge_step=start.first_step + 1)

    def write(step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            if name != "step":
                writer.add_scalar(name, value, step)

    return Opened(write, writer.close)


def _open_wandb(start: Start) -> Opened:
    """Open a run of Weights & Biases in the project minillm; a continuation goes on in it."""
    import wandb

    identity = start.out / "wandb-run"
    if not identity.is_file():
        identity.write_text(secrets.token_hex(8), encoding="utf-8")
    run = wandb.init(
        project="minillm",
        name=start.out.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(start.out),
        config=dict(start.config),
    )
    return Opened(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


PLACES = {
    "csv": Place(_open_csv, None),
    "tensorboard": Place(_open_tensorboard, "tensorboardX"),
    "wandb": Place(_open_wandb, "wandb"),
}


class Writers:
    """Open places of `names`. A place that fails during the run is closed, and `say` gets a line.

    Raises ConfigError for a place that cannot be opened.
    """

    def __init__(self, names: list[str], start: Start, say: Callable[[str], object]) -> None:
        self._say, self._opened = say, dict[str, Opened]()
        for name in names:
            try:
                self._opened[name] = PLACES[name].open(start)
            except Exception as error:  # whatever another package raises
                raise ConfigError(
                    f"--log-to {name} cannot be opened: {_line(error)}; leave it out, or repair it"
                ) from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl to all places."""
        numbers = dict(_flat(line))
        for name, opened in list(self._opened.items()):
            try:
                opened.write(line["step"], numbers)
            except Exception as error:  # training goes on without this place
                del self._opened[name]
                self._say(f"--log-to {name} ended at step {line['step']}: {_line(error)}")

    def close(self) -> None:
        """Close all places."""
        for name, opened in self._opened.items():
            try:
                opened.close()
            except Exception as error:
                self._say(f"--log-to {name} did not close: {_line(error)}")


def place_names(text: str | None) -> list[str]:
    """Return the places that `--log-to` names. Raises ConfigError for an unknown one."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    return [known_name(word, PLACES, "place in --log-to") for word in dict.fromkeys(words)]


def check_packages(names: list[str]) -> None:
    """Raise ConfigError if a place needs a package that is not installed."""
    for name in names:
        package = PLACES[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--log-to {name} needs the package {package}; install it with: pip install "
                f"'minillm-mpi[{name}]', or use --log-to csv"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line, those of nested tables under a path."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
