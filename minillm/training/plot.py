"""Draw the curves of runs: `minillm plot runs/nano runs/other`, in the terminal or into a file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import clock, columns, compact
from minillm.base.metrics_file import METRICS, steps_of
from minillm.base.record import Record, option
from minillm.comm.process import run_program

LEFT = 9  # columns of the labels of the vertical axis
MARKS = "abcdefghijklmnopqrstuvwxyz"
LOG_RATIO = 3.0  # values that span more are drawn on a logarithmic axis
SUFFIXES = (".svg", ".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class PlotArgs(Record):
    """Draw a number of each step of one or more runs, in the terminal or into a file.

    The first words are folders of runs.
    """

    key: str = "loss"
    """Number of metrics.jsonl to draw: loss (with the held-out loss), val_loss, grad_norm, lr or
    tokens_per_second."""
    file: str | None = None
    """File to draw into, .svg, .png or .pdf; needs the extra [plot]."""
    rows: int = option(16, at_least=4)
    """Height of the drawing in the terminal."""


class Curve(NamedTuple):
    """Numbers of a run by step."""

    name: str
    mark: str  # one character in the terminal
    points: list[tuple[int, float]]  # (step, value), in order


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, lambda comm, asked: _show(*asked), argv)


def _parse(argv: list[str]) -> tuple[list[str], PlotArgs]:
    """Return the runs, which are the first words, and the options."""
    runs = []
    while argv and not argv[0].startswith("-"):
        runs.append(argv.pop(0))
    if not runs and not {"-h", "--help"} & set(argv):
        raise ConfigError("name the folder of a run first: minillm plot runs/nano")
    args = parse_flags(PlotArgs, argv, prog="minillm plot RUN...")
    if args.file is not None and Path(args.file).suffix not in SUFFIXES:
        raise ConfigError(f"--file {args.file} must end in one of {', '.join(SUFFIXES)}")
    return runs, args


def _show(runs: list[str], args: PlotArgs) -> None:
    found = {run: read_metrics(Path(run)) for run in dict.fromkeys(runs)}
    curves = list(_curves(found, args.key))
    if args.file is not None:
        _draw_file(curves, args.key, Path(args.file))
        print(f"drawn into {args.file}")
        return
    print("\n".join(chart(curves, min(columns(), 100), args.rows)))
    print(f"\n{'':{LEFT}}{', '.join(f'{curve.mark} {curve.name}' for curve in curves)}\n")
    print("\n".join(_table(found)))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl by step, without lines that a crash cut off.

    Raises ConfigError if there are none.
    """
    path = run / METRICS if run.is_dir() else run
    try:
        if not path.is_file():
            raise ConfigError(f"{run} holds no {METRICS}; name the folder of a run")
        lines = {step: json.loads(text) for step, text in steps_of(path)}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise ConfigError(f"{path} holds no step yet")
    return [lines[step] for step in sorted(lines)]


def _curves(found: dict[str, list[dict[str, Any]]], key: str) -> Iterator[Curve]:
    """Yield the curve of each run; for a single run and its loss, also the held-out loss."""
    for mark, (run, lines) in zip(_marks(len(found)), found.items(), strict=True):
        points = _points(lines, key)
        if not points:
            known = sorted({name for name in lines[-1] if _points(lines, name)} - {"step"})
            raise ConfigError(f"{run} has no number {key}; --key can be {', '.join(known)}")
        yield Curve(f"{key} of {run}", mark, points)
        if len(found) == 1 and key == "loss" and (held_out := _points(lines, "val_loss")):
            yield Curve("held-out loss", "o", held_out)


def _marks(number: int) -> Iterator[str]:
    """Yield a mark for each of `number` runs."""
    for index in range(number):
        yield "*" if number == 1 else MARKS[index % len(MARKS)]


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the lines that have a finite number under `key`."""
    found: list[tuple[int, Any]] = [(int(line["step"]), line.get(key)) for line in lines]
    return [(step, float(value)) for step, value in found if _is_finite(value)]


def _is_finite(value: Any) -> bool:
    """Return True for a number within the range of floats: JSON has integers of any size."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def chart(curves: Sequence[Curve], width: int, height: int) -> list[str]:
    """Return the curves as lines of text, `width` columns wide. A column shows a mean."""
    space = max(10, width - LEFT - 2)
    first = min(curve.points[0][0] for curve in curves)
    last = max(curve.points[-1][0] for curve in curves)
    drawn = [(curve.mark, _columns(curve, first, last, space)) for curve in curves]
    values = [value for _, column in drawn for value in column.values()]
    scale = _scale(min(values), max(values))
    low, span = scale(min(values)), (scale(max(values)) - scale(min(values))) or 1.0
    grid = [[" "] * space for _ in range(height)]
    for mark, column in drawn:
        for x, value in column.items():
            grid[round((1 - (scale(value) - low) / span) * (height - 1))][x] = mark
    labels = {0: max(values), height // 2: None, height - 1: min(values)}
    middle = low + span * (1 - (height // 2) / (height - 1))
    labels[height // 2] = math.exp(middle) if scale is math.log else middle
    lines = []
    for row, cells in enumerate(grid):
        label = f"{labels[row]:#.4g}" if row in labels else ""
        lines.append(f"{label:>{LEFT - 1}} |{''.join(cells)}".rstrip())
    lines.append(f"{'':{LEFT}}+{'-' * space}")
    lines.append(f"{'':{LEFT}} step {first}{f'{last}':>{space - 5 - len(str(first))}}")
    return lines


def _columns(curve: Curve, first: int, last: int, space: int) -> dict[int, float]:
    """Return the mean value in each column that holds points."""
    groups: dict[int, list[float]] = {}
    for step, value in curve.points:
        groups.setdefault((step - first) * (space - 1) // max(1, last - first), []).append(value)
    return {x: sum(group) / len(group) for x, group in groups.items()}


def _scale(low: float, high: float) -> Any:
    """Return the function of the vertical axis: a logarithm where the values span much."""
    return math.log if low > 0 and high / low > LOG_RATIO else float


def _table(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yield one line for each run: its steps, losses, speed and time."""
    width = max(len("run"), *map(len, found))
    yield f"{'run':{width}}  {'step':>7}  {'loss':>6}  {'held-out (best at)':>22}  tokens/s  time"
    for run, lines in found.items():
        losses, held_out = _points(lines, "loss"), _points(lines, "val_loss")
        recent = [value for _, value in losses[-20:]]
        mean = f"{sum(recent) / len(recent):#.4g}" if recent else "-"
        best = min(held_out, key=lambda point: point[1], default=None)
        held = f"{best[1]:#.4g} ({best[0]})" if best else "-"
        seconds = sum(value for _, value in _points(lines, "seconds"))
        tokens = sum(value for _, value in _points(lines, "tokens"))
        rate = compact(tokens / seconds) if seconds else "-"
        yield (
            f"{run:{width}}  {lines[-1]['step']:>7}  {mean:>6}  {held:>22}  {rate:>8}  "
            f"{clock(seconds)}"
        )


def _draw_file(curves: Sequence[Curve], key: str, path: Path) -> None:
    """Draw the curves with matplotlib. Raises ConfigError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--file needs matplotlib; install it with: pip install 'minillm-mpi[plot]', or leave "
            "it out for a drawing in the terminal"
        ) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        marker = "o" * (curve.mark == "o")
        axes.plot(*zip(*curve.points, strict=True), label=curve.name, linewidth=1, marker=marker)
    values = [value for curve in curves for _, value in curve.points]
    if _scale(min(values), max(values)) is math.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="step", ylabel=key)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--file {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
