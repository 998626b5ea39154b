"""Draw a pipeline schedule: `python -m minillm.schedule 1f1b --ranks 4 --svg schedule.svg`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import Record, known_name, option
from minillm.base.whole_file import write_asked
from minillm.comm.process import run_program
from minillm.pipeline.draw import draw_svg, draw_text
from minillm.pipeline.lower import lower
from minillm.pipeline.schedules import SCHEDULES
from minillm.pipeline.simulate import Cost, Timeline, simulate


@dataclass(frozen=True, kw_only=True)
class ScheduleArgs(Record):
    """Draw a pipeline schedule with its idle time and the activations it holds.

    The first word names it: gpipe or 1f1b.
    """

    ranks: int = 4
    """Pipeline ranks."""
    microbatches: int = 8
    """Microbatches per step."""
    forward_cost: float = option(1.0, above=0)
    """Time of a forward pass of one stage."""
    backward_cost: float = option(2.0, above=0)
    """Time of a backward pass of one stage."""
    gather_cost: float | None = option(None, at_least=0)
    """Time to gather the first block of a stage, as ZeRO 3 does; left out: nothing is gathered."""
    svg: str | None = None
    """File to draw into."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, lambda comm, options: _show(*options), argv)


def _parse(argv: list[str]) -> tuple[str, ScheduleArgs]:
    """Return the schedule's name, which is the first word, and the options."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    if not name and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"name a schedule first: {' or '.join(SCHEDULES)}")
    args = parse_flags(ScheduleArgs, argv, prog="python -m minillm.schedule SCHEDULE")
    return known_name(name, SCHEDULES, "schedule"), args


def _show(name: str, args: ScheduleArgs) -> None:
    schedule = SCHEDULES[name](args.ranks, args.microbatches)
    sharded = args.gather_cost is not None
    cost = Cost(  # 0.1 is a tenth exactly
        forward=Fraction(str(args.forward_cost)),
        backward=Fraction(str(args.backward_cost)),
        gather=Fraction(str(args.gather_cost or 0)),
    )
    timeline = simulate(lower(schedule, sharded=sharded), cost)  # as it would be executed
    print(draw_text(timeline, shutil.get_terminal_size((160, 24)).columns))
    print(_summary(name, timeline, args))
    if args.svg is not None:
        title = f"{name}, {args.ranks} ranks, {args.microbatches} microbatches"
        write_asked(Path(args.svg), draw_svg(timeline, title), "--svg")
        print(f"drawn into {args.svg}")


def _summary(name: str, timeline: Timeline, args: ScheduleArgs) -> str:
    p, m = args.ranks, args.microbatches
    in_flight = [timeline.peak_in_flight(rank) for rank in range(p)]
    formula = "1 on one rank" if p == 1 else "m" if name == "gpipe" else "min(m, p - rank)"
    expected = [1 if p == 1 else m if name == "gpipe" else min(m, p - rank) for rank in range(p)]
    return (
        f"\ntime       {float(timeline.makespan):g}, of which each rank computes "
        f"{float(timeline.busy(0)):g}\n"
        f"bubble     {float(timeline.bubble):.4f} simulated, {(p - 1) / (m + p - 1):.4f} by (p - "
        "1) / (m + p - 1)\n"
        f"in flight  {' '.join(map(str, in_flight))} microbatches held at most by each rank, "
        f"{' '.join(map(str, expected))} by {formula}"
    )


if __name__ == "__main__":
    sys.exit(main())
