"""A schedule as a picture: text for a terminal, SVG for a page."""

from __future__ import annotations

import html
import math
from fractions import Fraction

from minillm.pipeline.action import ActionKind
from minillm.pipeline.simulate import Event, Time, Timeline

K = ActionKind

COLOURS = {K.F: "#5b8def", K.B: "#f2a65a", K.I: "#f2a65a", K.W: "#7bc47f"}
NAMES = {K.F: "forward", K.B: "backward", K.I: "input gradient", K.W: "weight gradient"}

MAX_CELLS = 4
"""The most cells of text that the shortest action gets for the sake of exact proportions."""


def draw_text(timeline: Timeline, width: int = 160) -> str:
    """One row a rank, time from left to right: F3 is microbatch 3 forward, dots are idle time. The
    last line is the bubble fraction.

    A cell is the longest time of which all actions are multiples, or, where that is too fine, the
    shortest action. A drawing wider than `width` characters is cut, and says so.
    """
    unit = _unit(timeline)
    cell = 1 + max((len(_label(event)) for event in timeline.events), default=1)
    num_cells = max(1, round(timeline.makespan / unit))
    shown = min(num_cells, width // cell + 1)
    margin = max(7, len(f"rank {timeline.schedule.num_ranks - 1} "))
    rows = [["·".rjust(cell)] * shown for _ in range(timeline.schedule.num_ranks)]
    for event in timeline.events:
        first = round(event.start / unit)
        last = max(first + 1, round(event.end / unit))
        for at in range(first, min(last, shown)):
            rows[event.rank][at] = _label(event).rjust(cell) if at == first else "─" * cell
    lines = [f"rank {rank}".ljust(margin) + "".join(row) for rank, row in enumerate(rows)]
    full = margin + num_cells * cell
    if full > width:
        lines = [line[: width - 1] + "…" for line in lines]
        lines.append(f"(cut at {width} characters of {full}; --svg FILE draws it all)")
    return "\n".join([*lines, f"bubble {float(timeline.bubble):.1%}"])


def _unit(timeline: Timeline) -> Time:
    """The time that one cell of text stands for."""
    shortest = _shortest(timeline)
    times = [Fraction(time) for event in timeline.events for time in (event.start, event.end)]
    denominator = math.lcm(*(time.denominator for time in times))
    common = Fraction(math.gcd(*(int(time * denominator) for time in times)), denominator)
    return common if common > 0 and shortest <= MAX_CELLS * common else shortest


def _shortest(timeline: Timeline) -> Time:
    return min(
        (event.end - event.start for event in timeline.events if event.end > event.start), default=1
    )


def _label(event: Event) -> str:
    kind, _, microbatch = event.action
    return f"{kind}{microbatch}"


def draw_svg(timeline: Timeline, title: str) -> str:
    """A self-contained SVG: one track a rank, one box an action with its microbatch, idle time as
    background, a legend, the bubble fraction."""
    left, top, height, gap = 70, 56, 34, 10
    ranks = timeline.schedule.num_ranks
    span, shortest = float(timeline.makespan) or 1.0, float(_shortest(timeline))
    scale = min(60 / shortest, max(14 / shortest, 1100 / span))  # pixels per unit of time
    length, bottom = span * scale, top + ranks * (height + gap)
    width = max(left + length + 24, 640)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 44}"',
        '     font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width:.0f}" height="{bottom + 44}" rx="8" fill="#fbfbfd"/>',
        '<text x="16" y="28" font-size="16" font-weight="600" '
        f'fill="#22252b">{html.escape(title)}</text>',
        f'<text x="{width - 16:.0f}" y="28" text-anchor="end" fill="#5a606b">bubble '
        f"{float(timeline.bubble):.1%}</text>",
    ]
    for rank in range(ranks):
        y = top + rank * (height + gap)
        parts.append(f'<text x="16" y="{y + height / 2 + 4:.0f}" fill="#22252b">rank {rank}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{height}" rx="4" '
            'fill="#e7e9ef"/>'
        )
    parts += [
        _box(event, left, top + event.rank * (height + gap), height, scale, ranks)
        for event in timeline.events
    ]
    parts += _legend(timeline, left, bottom + 20)
    return "\n".join([*parts, "</svg>", ""])


def _box(event: Event, left: int, y: int, height: int, scale: float, ranks: int) -> str:
    """One action; stages beyond the first of a rank are drawn with a darker edge."""
    x, width = left + float(event.start) * scale, float(event.end - event.start) * scale
    kind, stage, microbatch = event.action
    edge = ' stroke="#22252b" stroke-width="1.2"' if stage >= ranks else ""
    place = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}"'
    label = (
        f'<text {place} text-anchor="middle" fill="#14161a">{microbatch}</text>'
        if width > 12
        else ""
    )
    size = f'width="{max(width - 2, 1):.1f}" height="{height - 2}"'
    box = f'<rect x="{x + 1:.1f}" y="{y + 1}" {size} rx="3" fill="{COLOURS[kind]}"{edge}>'
    title = f"{event.action}: {float(event.start):g} to {float(event.end):g}"
    return f"{box}<title>{title}</title></rect>{label}"


def _legend(timeline: Timeline, x: float, y: float) -> list[str]:
    parts = []
    used = {event.action.kind for event in timeline.events}
    for kind in (kind for kind in COLOURS if kind in used):
        parts.append(
            f'<rect x="{x}" y="{y - 11}" width="14" height="14" rx="3" fill="{COLOURS[kind]}"/>'
        )
        parts.append(f'<text x="{x + 20}" y="{y + 1}" fill="#5a606b">{NAMES[kind]}</text>')
        x += 40 + 8 * len(NAMES[kind])
    return [
        *parts,
        f'<text x="{x}" y="{y + 1}" fill="#5a606b">numbers are microbatches, grey is idle '
        "time</text>",
    ]
