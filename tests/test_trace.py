"""Traces are bounded, and end in one line where they cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.base import trace
from minillm.base.errors import MinillmError
from minillm.base.trace import Tracer
from minillm.comm.single import SelfCommunicator


def test_a_trace_keeps_its_first_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_EVENTS", 3)
    tracer = Tracer(0)
    for number in range(5):
        tracer.add(f"span {number}", "compute", float(number), number + 1.0)
    tracer.write(tmp_path / "trace.json", SelfCommunicator())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event["name"] for event in events if event["ph"] == "X"]
    assert spans == ["span 0", "span 1", "span 2"] and tracer.dropped == 2


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MinillmError, match=r"none/trace\.json cannot be written: No such file"):
        Tracer(0).write(tmp_path / "none" / "trace.json", SelfCommunicator())


def test_operations_in_the_background_have_tracks_of_their_own(tmp_path: Path) -> None:
    """Check that spans of a thread never overlap, and that each thread is named by its track."""
    tracer = Tracer(0)
    for name, start, end in [
        ("all_reduce", 0.0, 1.0),
        ("iall_gather", 0.0, 2.0),
        ("iall_gather", 2.0, 3.0),
        ("ireduce_scatter", 0.0, 2.0),
        ("ireduce_scatter", 1.0, 4.0),
        ("ireduce_scatter", 3.0, 5.0),
        ("isend", 0.0, 1.0),
    ]:
        tracer.communication(name, "dp", start, end, 8)
    tracer.write(tmp_path / "trace.json", SelfCommunicator())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert [tracks[e["tid"]] for e in spans] == [
        "communication",
        *["prefetch"] * 2,
        *["reduction"] * 3,
        "messages",
    ]
    assert len({e["tid"] for e in spans}) == 5  # a second thread for the reduction that overlaps


def test_parts_divide_a_span_and_count_within_one_alone() -> None:
    tracer = Tracer(0)
    tracer.part("an evaluation's")
    with tracer.span("whole", "compute"):
        tracer.part("second", before="first")
        tracer.part("third", before="never")
    tracer.part("another")
    assert [event["name"] for event in tracer._events] == ["first", "second", "third", "whole"]
    first, second, third, whole = tracer._events
    assert first["ts"] == whole["ts"]
    assert second["ts"] == pytest.approx(first["ts"] + first["dur"], abs=1)
    assert third["ts"] + third["dur"] == pytest.approx(whole["ts"] + whole["dur"], abs=1)
