"""A schedule as a picture: text for a terminal, SVG for a page."""

from __future__ import annotations

from minillm.pipeline.action import ActionKind
from minillm.pipeline.simulate import Event, Timeline

K = ActionKind

COLOURS = {K.F: "#5b8def", K.B: "#f2a65a", K.I: "#f2a65a", K.W: "#7bc47f"}
NAMES = {K.F: "forward", K.B: "backward", K.I: "input gradient", K.W: "weight gradient"}


def draw_text(timeline: Timeline, width: int = 160) -> str:
    """One row a rank, time from left to right, one cell the time of the shortest action: F3 is microbatch 3 forward, dots are idle time.

    A drawing wider than `width` characters is cut, and says so.
    """
    unit = min((event.end - event.start for event in timeline.events if event.end > event.start), default=1)
    cell = 1 + max(len(_label(event)) for event in timeline.events)
    lines = []
    for rank in range(timeline.schedule.num_ranks):
        row = ["·".rjust(cell)] * round(float(timeline.makespan / unit))
        for event in (e for e in timeline.events if e.rank == rank):
            first, last = round(float(event.start / unit)), round(float(event.end / unit))
            row[first:last] = [_label(event).rjust(cell), *["─" * cell] * (last - first - 1)]
        lines.append(f"rank {rank:<2}" + "".join(row))
    longest = max(map(len, lines))
    if longest > width:
        lines = [line[: width - 1] + "…" for line in lines]
        lines.append(f"(cut at {width} characters of {longest}; --svg FILE draws it all)")
    return "\n".join(lines)


def _label(event: Event) -> str:
    kind, _, microbatch = event.action
    return f"{kind}{microbatch}"


def draw_svg(timeline: Timeline, title: str) -> str:
    """A self-contained SVG: one track a rank, one box an action with its microbatch, the idle time as background, a legend, the bubble
    fraction."""
    left, top, height, gap = 70, 56, 34, 10
    ranks = timeline.schedule.num_ranks
    span = float(timeline.makespan) or 1.0
    scale = min(60.0, max(14.0, 1100 / span))
    width, bottom = left + span * scale + 24, top + ranks * (height + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 44}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width:.0f}" height="{bottom + 44}" rx="8" fill="#fbfbfd"/>',
        f'<text x="16" y="28" font-size="16" font-weight="600" fill="#22252b">{title}</text>',
        f'<text x="{width - 16:.0f}" y="28" text-anchor="end" fill="#5a606b">bubble {float(timeline.bubble):.1%}</text>',
    ]
    for rank in range(ranks):
        y = top + rank * (height + gap)
        parts.append(f'<text x="16" y="{y + height / 2 + 4:.0f}" fill="#22252b">rank {rank}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{span * scale:.1f}" height="{height}" rx="4" fill="#e7e9ef"/>')
    parts += [_box(event, left, top + event.rank * (height + gap), height, scale, ranks) for event in timeline.events]
    parts += _legend(timeline, left, bottom + 20)
    return "\n".join([*parts, "</svg>", ""])


def _box(event: Event, left: int, y: int, height: int, scale: float, ranks: int) -> str:
    """One action; stages beyond the first of a rank are drawn with a darker edge."""
    x, width = left + float(event.start) * scale, float(event.end - event.start) * scale
    kind, stage, microbatch = event.action
    edge = ' stroke="#22252b" stroke-width="1.2"' if stage >= ranks else ""
    label = (
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" fill="#14161a">{microbatch}</text>'
        if width > 12
        else ""
    )
    box = f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{max(width - 2, 1):.1f}" height="{height - 2}" rx="3" fill="{COLOURS[kind]}"{edge}>'
    return f"{box}<title>{event.action}: {float(event.start):g} to {float(event.end):g}</title></rect>{label}"


def _legend(timeline: Timeline, x: float, y: float) -> list[str]:
    parts = []
    used = {event.action.kind for event in timeline.events}
    for kind in (kind for kind in COLOURS if kind in used):
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" rx="3" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 1}" fill="#5a606b">{NAMES[kind]} (number: microbatch)</text>')
        x += 220
    return [*parts, f'<text x="{x}" y="{y + 1}" fill="#5a606b">grey: idle</text>']
