"""Report: the results as a Markdown page, with the state of the goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Found = dict[str, Any]

_PEERS = ("flash", "cuDNN")
_GROUPS = {"flash": ("flash",), "cuDNN": ("cuDNN",), "the faster peer": _PEERS}
_SHORT, _LONG = (64, True, 1024), (128, True, 4096)  # head width, causal, T
GOAL_SHAPES = (_SHORT, _LONG)
# Our rate over that of a group of peers: direction, shape, group, targets by stages.
_ATTENTION_GOALS = (
    ("forward", _SHORT, "flash", (0.9, 1.0)),
    ("forward", _SHORT, "the faster peer", (1.1,)),
    ("forward", _LONG, "flash", (0.9, 1.4)),
    ("forward", _LONG, "cuDNN", (1.0,)),
    ("backward", _SHORT, "flash", (0.8, 1.0)),
    ("backward", _SHORT, "cuDNN", (1.0,)),
    ("backward", _LONG, "flash", (0.8, 1.0)),
    ("backward", _LONG, "cuDNN", (1.0,)),
)
_FAMILIES = ("layernorm", "rmsnorm", "gelu", "swiglu", "xent", "adamw")
_NO_RATES: Found = {"forward": {}, "backward": {}}


def error_line(error: Exception) -> str:
    """Return the type and the message of an error in one line, cut after 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def markdown(found: Found) -> str:
    """Return the results as a Markdown page."""
    parts = [_head(found), _smoke(found), _tests(found)]
    if attention := found.get("attention"):
        parts += [_attention(attention, way) for way in ("forward", "backward")]
        if attention["notes"]:
            parts.append("\n".join(f"- {note}" for note in attention["notes"]))
    if found.get("steps"):
        parts.append(_steps(found["steps"]))
    if found.get("training"):
        parts.append(found["training"]["page"])
    optional = ("ceilings", "attention", "steps", "sanitizer", "training")
    if missing := [name for name in optional if not found.get(name)]:
        parts.append(f"Not run or incomplete: {', '.join(missing)}.")
    parts.append(_goals(found))
    return "\n\n".join(parts) + "\n"


def failed(found: Found) -> list[str]:
    """Return a line for every failure, and for all that was not run for lack of time."""
    words = list(found.get("problems", ()))
    words += [
        f"smoke test {t['name']}: {t['words']}"
        for t in found.get("smoke") or ()
        if t["outcome"] == "failed"
    ]
    tests = found.get("tests")
    if tests:
        words += [f"{f['case']}: {f['words']}" for f in tests["failures"]]
        words += [f"no time for {tests['no_time']} cases"] if tests["no_time"] else []
        words += [] if tests["ran"] else ["no case ran"]
    if (found.get("sanitizer") or {}).get("outcome") == "failed":
        words.append(f"compute-sanitizer: {found['sanitizer']['words']}")
    return words + [
        f"{row['name']}: {row['error']}" for row in found.get("steps") or () if "error" in row
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in pairs)} |"

    rule = f"|{'|'.join('-' * (w + 1) + (':' if i else '-') for i, w in enumerate(widths))}|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _head(found: Found) -> str:
    device, ceilings = found["device"], found.get("ceilings")
    lines = [
        f"# Kernels on {device['name']}",
        "",
        f"Commit {found['commit']}, {found['date']}, `kernels/gpu_check.sh`, "
        f"{found['seconds']:.0f} s.",
    ]
    lines += [
        "",
        table(
            ("property", "value"),
            [[name, str(value)] for name, value in {**device, **found["software"]}.items()],
        ),
    ]
    if ceilings:
        measured = (
            f"{ceilings['gemm_tflops']:.0f} TFLOP/s in a bfloat16 product of 8192, "
            f"{ceilings['copy_tbs']:.2f} TB/s in a copy"
        )
        lines += ["", f"Ceilings: {measured} (read and written)."]
    return "\n".join(lines)


def _smoke(found: Found) -> str:
    rows = [
        [t["name"], t["outcome"], t["words"].replace("|", "\\|")[:200]]
        for t in found.get("smoke") or ()
    ]
    return "## Smoke tests\n\n" + (
        table(("test", "outcome", "words"), rows) if rows else "Not run."
    )


def _tests(found: Found) -> str:
    tests, sanitizer = found.get("tests"), found.get("sanitizer")
    if not tests:
        return "## Kernel tests\n\nNot run."
    words = (
        f"{tests['ran']} cases, {tests['repeats']} times each with poisoned outputs, bits "
        f"compared: {len(tests['failures'])} failed"
    )
    lines = [f"## Kernel tests\n\n{words}, {tests['seconds']:.0f} s."]
    lines += [f"- {f['case']}: {f['words']}" for f in tests["failures"][:50]]
    lines += [f"- left out: {reason}" for reason in tests.get("left_out", ())]
    lines += [f"- no time for {tests['no_time']} cases"] if tests["no_time"] else []
    lines += (
        [f"- compute-sanitizer: {sanitizer['outcome']}, {sanitizer['words']}"] if sanitizer else []
    )
    return "\n".join(lines)


def _attention(attention: Found, way: str) -> str:
    """Return the section on one direction, in TFLOP/s.

    The last column holds our fastest variant as a share of the faster peer.
    """
    names = list(dict.fromkeys(name for row in attention["rows"] for name in row[way]))
    rows = []
    for row in attention["rows"]:
        rates = row[way]
        share = best_of(row, way)
        cells = [f"{rates[name]:.0f}" if name in rates else "" for name in names]
        mask = "causal" if row["causal"] else "full"
        rows.append(
            [f"{row['head_width']} {mask} {row['T']}", *cells, f"{share:.2f}" if share else ""]
        )
    flops = "4 B H T^2 K" if way == "forward" else "10 B H T^2 K"
    title = f"## Attention {way}, bfloat16, TFLOP/s ({flops}, half under the causal mask)"
    return f"{title}\n\n" + table(("head width, mask, T", *names, "of the faster peer"), rows)


def best_of(row: Found, way: str, peers: Sequence[str] = _PEERS) -> float | None:
    """Return our fastest variant's rate over that of the fastest of `peers`.

    None if one of the two was not measured.
    """
    ours = _ours(row, way)
    theirs = [row[way][name] for name in peers if name in row[way]]
    return max(ours) / max(theirs) if ours and theirs else None


def _ours(row: Found, way: str) -> list[float]:
    return [rate for name, rate in row[way].items() if name not in _PEERS]


def _steps(steps: Sequence[Found]) -> str:
    cells = [
        [row["name"], f"error: {row['error'][:80]}", "", "", ""]
        if "error" in row
        else [
            row["name"],
            f"{row['microseconds']:.0f}",
            f"{row['megabytes']:.0f}",
            f"{row['tbs']:.2f}",
            f"{row['share']:.2f}",
        ]
        for row in steps
    ]
    return "## Other kernels, bfloat16\n\n" + table(
        ("kernel", "us", "MB", "TB/s", "of the copy"), cells
    )


def _goals(found: Found) -> str:
    rows = []
    for name, targets, measured in goals(found):
        wanted = " / ".join(f"{target:g}" for target in targets)
        if measured is None:
            rows.append([name, wanted, "not measured", ""])
        else:
            reached = [target for target in targets if measured >= target]
            rows.append(
                [
                    name,
                    wanted,
                    f"{measured:.2f}",
                    f"reached {reached[-1]:g}" if reached else "missed",
                ]
            )
    return "## Goals\n\n" + table(("goal", "at least, by stages", "measured", ""), rows)


def goals(found: Found) -> list[tuple[str, tuple[float, ...], float | None]]:
    """Return (name, targets, measured) of every goal.

    The targets rise by stages. `measured` is None if it was not measured.
    """
    attention = (found.get("attention") or {"rows": []})["rows"]
    rows = {(row["head_width"], row["causal"], row["T"]): row for row in attention}
    shares = [(row["name"], row["share"]) for row in found.get("steps") or () if "share" in row]

    def slowest(family: str) -> float | None:
        return min((share for name, share in shares if name.startswith(family)), default=None)

    return [
        *(
            (
                f"attention {way}, width {shape[0]} causal {shape[2] // 1024}k, of {group}",
                targets,
                best_of(rows.get(shape, _NO_RATES), way, _GROUPS[group]),
            )
            for way, shape, group, targets in _ATTENTION_GOALS
        ),
        (
            "attention forward, width 128 causal 4k, TFLOP/s",
            (450.0,),
            max(_ours(rows.get(_LONG, _NO_RATES), "forward"), default=None),
        ),
        *(
            (f"slowest {family} kernel, of the copy", (0.8, 0.9, 0.95), slowest(family))
            for family in _FAMILIES
        ),
    ]
