"""Drawings of simulated schedules: text for a terminal, SVG for a page."""

from __future__ import annotations

import html
import math
from fractions import Fraction

from minillm.pipeline.action import ActionKind
from minillm.pipeline.simulate import Event, Time, Timeline

K = ActionKind

COLOURS = {K.F: "#5b8def", K.B: "#f2a65a", K.I: "#f2a65a", K.W: "#7bc47f"}
INK, GREY, GATHER = "#22252b", "#5a606b", "#9b6fc9"
NAMES = {K.F: "forward", K.B: "backward", K.I: "input gradient", K.W: "weight gradient"}

MAX_CELLS = 4  # cells of text that the shortest action may take to keep exact proportions


def draw_text(timeline: Timeline, width: int = 160) -> str:
    """Draw one row a rank, time from left to right, and the bubble fraction.

    F3 is microbatch 3 forward, dots are idle time. A cell is the greatest common divisor of all
    times, or the shortest action where that is too fine. Rows are cut at `width` characters, and a
    line reports the cut.
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
    """Return the time of one cell of text."""
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
    """Return a self-contained SVG: one track a rank, one box an action with its microbatch.

    The background is idle time. Includes a legend and the bubble fraction.
    """
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
        _text(16, 28, html.escape(title), INK, ' font-size="16" font-weight="600"'),
        _text(width - 16, 28, f"bubble {float(timeline.bubble):.1%}", GREY, ' text-anchor="end"'),
    ]
    for rank in range(ranks):
        y = top + rank * (height + gap)
        parts.append(_text(16, y + height / 2 + 4, f"rank {rank}", INK))
        parts.append(_rect(left, y, length, height, "#e7e9ef", 4) + "/>")
    parts += [
        _box(event, left, top + event.rank * (height + gap), height, scale, ranks)
        for event in timeline.events
    ]
    for event in timeline.gathers:
        x, y = left + float(event.start) * scale, top + event.rank * (height + gap) + height
        width = float(event.end - event.start) * scale
        if width:
            title = f"<title>{event.action}: gathers the first block</title></rect>"
            parts.append(_rect(x + 1, y, max(width - 2, 1), 5, GATHER, 2) + f">{title}")
    parts += _legend(timeline, left, bottom + 20)
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, fill: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{attributes}>{text}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str, radius: int) -> str:
    """Return a rectangle whose tag is still open."""
    size = f'width="{width:.1f}" height="{height}" rx="{radius}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}"'


def _box(event: Event, left: int, y: int, height: int, scale: float, ranks: int) -> str:
    """Draw an action; later stages of a rank have a dark edge."""
    x, width = left + float(event.start) * scale, float(event.end - event.start) * scale
    kind, stage, microbatch = event.action
    edge = f' stroke="{INK}" stroke-width="1.2"' if stage >= ranks else ""
    title = f"{event.action}: {float(event.start):g} to {float(event.end):g}"
    box = _rect(x + 1, y + 1, max(width - 2, 1), height - 2, COLOURS[kind], 3)
    at = x + width / 2, y + height / 2 + 4
    label = _text(*at, str(microbatch), INK, ' text-anchor="middle"') if width > 12 else ""
    return f"{box}{edge}><title>{title}</title></rect>{label}"


def _legend(timeline: Timeline, x: float, y: float) -> list[str]:
    parts = []
    used = {event.action.kind for event in timeline.events}
    for kind in (kind for kind in COLOURS if kind in used):
        parts.append(_rect(x, y - 11, 14, 14, COLOURS[kind], 3) + "/>")
        parts.append(_text(x + 20, y + 1, NAMES[kind], GREY))
        x += 40 + 8 * len(NAMES[kind])
    if any(event.end > event.start for event in timeline.gathers):
        parts.append(_rect(x, y - 6, 14, 5, GATHER, 2) + "/>")
        parts.append(_text(x + 20, y + 1, "gather", GREY))
        x += 88
    return [*parts, _text(x, y + 1, "numbers are microbatches, grey is idle time", GREY)]
