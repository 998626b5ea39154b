"""Schedules as data: complete, and free of deadlock even without buffering.

Their bubble and memory are those that the papers promise.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import Action, ActionKind, Link, Schedule
from minillm.pipeline.draw import draw_svg, draw_text
from minillm.pipeline.lower import lower
from minillm.pipeline.schedules import SCHEDULES, forward_only
from minillm.pipeline.simulate import Cost, simulate
from minillm.schedule import main

K = ActionKind


def evaluation(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return the forward-only schedule with one stage a rank."""
    return forward_only(range(num_ranks), num_microbatches)


SIZES = [(p, m) for p in range(1, 9) for m in range(1, 17)]


@pytest.mark.parametrize("kind", list(K))
def test_actions_print_and_parse_back(kind: ActionKind) -> None:
    for action in (Action(kind, 2, 5), Action(kind, 11), Action(kind, 0, 0)):
        assert Action.parse(str(action)) == action
    assert str(Action(K.F, 2, 5)) == "2F5"


@pytest.mark.parametrize("text", ["", "F5", "2X5", "2F5x", "-1F0", "2.0F1"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="no action"):
        Action.parse(text)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_bubble_and_memory_equal_the_formulas(name: str) -> None:
    for p, m in SIZES:
        schedule = SCHEDULES[name](p, m)
        schedule.validate()
        for cost in (Cost(forward=1, backward=1), Cost(forward=3, backward=5)):
            timeline = simulate(schedule, cost)
            assert timeline.bubble == Fraction(p - 1, m + p - 1), (p, m)
        held = [timeline.peak_in_flight(rank) for rank in range(p)]
        assert held == [
            1 if p == 1 else m if name == "gpipe" else min(m, p - rank) for rank in range(p)
        ], (p, m)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_gradients_are_summed_in_the_order_of_the_microbatches(name: str) -> None:
    for p, m in SIZES:
        for stage, row in enumerate(SCHEDULES[name](p, m).actions):
            assert [a for a in row if a.kind is K.B] == [Action(K.B, stage, i) for i in range(m)]


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("rendezvous", [False, True])
def test_lowered_schedules_finish_even_if_sends_wait_for_their_receivers(
    name: str, rendezvous: bool
) -> None:
    for p, m in SIZES:
        lowered = lower(SCHEDULES[name](p, m), ties=(0, p - 1))
        timeline = simulate(lowered, Cost(forward=1, backward=1), rendezvous=rendezvous)
        assert len(timeline.events) == 2 * p * m
        sends = sum(a.kind in (K.SEND_F, K.SEND_B) for row in lowered.actions for a in row)
        receives = sum(a.kind in (K.RECV_F, K.RECV_B) for row in lowered.actions for a in row)
        assert sends == receives == 2 * (p - 1) * m


@pytest.mark.parametrize("name", [*SCHEDULES, "forward_only"])
@pytest.mark.parametrize(
    "cost",
    [Cost(1, 1), Cost(1, 2), Cost(3, 5), Cost(2, 1), Cost(1, 9)],
    ids=lambda c: f"{c.forward}-{c.backward}",
)
def test_messages_cost_no_time_by_where_they_stand(name: str, cost: Cost) -> None:
    """Check that lowering leaves all events of a schedule unchanged.

    A receive that stands too early would make its rank wait for what it needs only later.
    """
    for p, m in SIZES:
        schedule = SCHEDULES.get(name, evaluation)(p, m)
        lowered = simulate(lower(schedule, train=name in SCHEDULES), cost)
        assert set(lowered.events) == set(simulate(schedule, cost).events), (p, m)


def test_lowered_rows_of_1f1b() -> None:
    rows = [" ".join(map(str, row)) for row in lower(SCHEDULES["1f1b"](2, 2)).actions]
    assert rows == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE_GRAD 0OPTIMIZER_STEP",
        "1RECV_F0 1F0 1B0 1RECV_F1 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE_GRAD 1OPTIMIZER_STEP",
    ]


def test_gathers_stand_around_the_passes_of_a_stage() -> None:
    """Check that gathers begin behind the sends, before the receives, and end with the stage."""
    rows = lower(SCHEDULES["1f1b"](2, 2), sharded=True).actions
    assert [" ".join(map(str, row)) for row in rows] == [
        "0UNSHARD_F0 0F0 0SEND_F0 0UNSHARD_F1 0F1 0SEND_F1 0UNSHARD_B0 0RECV_B0 0B0 0UNSHARD_B1 "
        "0RECV_B1 0B1 0RESHARD 0REDUCE_GRAD 0OPTIMIZER_STEP",
        "1UNSHARD_F0 1RECV_F0 1F0 1UNSHARD_B0 1B0 1UNSHARD_F1 1RECV_F1 1SEND_B0 1F1 1UNSHARD_B1 "
        "1B1 1RESHARD 1SEND_B1 1REDUCE_GRAD 1OPTIMIZER_STEP",
    ]
    rows = lower(evaluation(1, 2), train=False, sharded=True).actions
    assert [" ".join(map(str, row)) for row in rows] == ["0UNSHARD_F0 0F0 0UNSHARD_F1 0F1 0RESHARD"]


def test_one_stage_of_a_rank_is_gathered_at_a_time() -> None:
    rows = [["0F0", "1F0", "1I0", "0I0", "1W0", "0W0"]]
    schedule = Schedule(2, 1, (0, 0), tuple(tuple(map(Action.parse, row)) for row in rows))
    (row,) = lower(schedule, sharded=True).actions
    assert " ".join(map(str, row)).startswith(
        "0UNSHARD_F0 0F0 0RESHARD 1UNSHARD_F0 1F0 1UNSHARD_B0 1I0 1RESHARD 0UNSHARD_B0 0I0 "
        "0RESHARD 1W0 1RESHARD 0W0 0RESHARD"
    )


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_gathers_change_no_message_and_no_time_of_their_own(name: str) -> None:
    for p, m in SIZES:
        plain = simulate(lower(SCHEDULES[name](p, m)))
        sharded = simulate(lower(SCHEDULES[name](p, m), sharded=True), rendezvous=True)
        assert set(sharded.events) == set(plain.events), (p, m)
        assert len(sharded.gathers) == p  # the stage stays in use until the end of the step


def test_the_first_gather_hides_behind_the_wait_for_the_input() -> None:
    """Check the time of two ranks: gather, F, F, B, B; rank 1 gathers while it waits."""
    schedule = lower(SCHEDULES["1f1b"](2, 1), sharded=True)
    for gather, makespan in ((0, 6), (1, 7), (5, 11)):
        assert simulate(schedule, Cost(forward=1, backward=2, gather=gather)).makespan == makespan
    timeline = simulate(schedule, Cost(gather=5))
    assert [(g.rank, g.start, g.end) for g in timeline.gathers] == [(0, 0, 5), (1, 0, 5)]
    assert draw_svg(timeline, "").count("gathers the first block") == 2
    assert timeline.busy(0) == 3


def test_a_send_takes_its_time() -> None:
    """Check the time of two ranks and one microbatch: F, message, F B, message, B."""
    for schedule in (SCHEDULES["1f1b"](2, 1), lower(SCHEDULES["1f1b"](2, 1))):
        assert simulate(schedule, Cost(forward=1, backward=2, send=10)).makespan == 26


def test_evaluation_holds_no_activations() -> None:
    timeline = simulate(lower(evaluation(3, 5), train=False))
    assert [timeline.peak_in_flight(rank) for rank in range(3)] == [0, 0, 0]


def test_two_stages_of_a_rank_hand_over_without_messages() -> None:
    """Lower a schedule with stages 0 and 1 on rank 0 and stage 2 on rank 1."""
    rows = [["0F0", "1F0", "1B0", "0B0"], ["2F0", "2B0"]]
    schedule = Schedule(3, 1, (0, 0, 1), tuple(tuple(map(Action.parse, row)) for row in rows))
    lowered = lower(schedule)
    assert [str(a) for a in lowered.actions[0]] == [
        *(
            "0F0",
            "1F0",
            "1SEND_F0",
            "1RECV_B0",
            "1B0",
            "0B0",
            "0REDUCE_GRAD",
            "1REDUCE_GRAD",
            "0OPTIMIZER_STEP",
        ),
    ]
    assert simulate(lowered, Cost(1, 1), rendezvous=True).makespan == 6


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 4)])
def test_nothing_to_do_is_refused(sizes: tuple[int, int]) -> None:
    for make in (*SCHEDULES.values(), evaluation):
        with pytest.raises(ScheduleError, match="at least 1 rank and 1 microbatch"):
            make(*sizes)


def test_one_rank_is_plain_accumulation() -> None:
    assert SCHEDULES["gpipe"](1, 3) == SCHEDULES["1f1b"](1, 3)
    assert [str(a) for a in lower(SCHEDULES["1f1b"](1, 2)).actions[0]] == [
        "0F0",
        "0B0",
        "0F1",
        "0B1",
        "0REDUCE_GRAD",
        "0OPTIMIZER_STEP",
    ]


def test_the_last_backward_of_each_stage_arms() -> None:
    assert lower(SCHEDULES["1f1b"](3, 4)).arming == {Action(K.B, stage, 3) for stage in range(3)}
    assert lower(evaluation(3, 4), train=False).arming == frozenset()


def test_tied_weights_are_summed_before_the_data_reduction() -> None:
    row = lower(SCHEDULES["gpipe"](2, 1), ties=(0, 1)).actions[1]
    assert [a.kind for a in row[-3:]] == [K.TIE_REDUCE, K.REDUCE_GRAD, K.OPTIMIZER_STEP]


def _with_row(schedule: Schedule, rank: int, row: list[Action]) -> Schedule:
    return dataclasses.replace(
        schedule, actions=(*schedule.actions[:rank], tuple(row), *schedule.actions[rank + 1 :])
    )


def test_a_deadlock_is_named() -> None:
    """Check the error where two ranks wait for each other.

    Rank 0 runs the backward of a microbatch before the forward that rank 1 needs first.
    """
    schedule = SCHEDULES["gpipe"](2, 2)
    row = [Action.parse(text) for text in ("0F0", "0B0", "0F1", "0B1")]
    crossed = _with_row(
        _with_row(schedule, 0, row),
        1,
        [Action.parse(text) for text in ("1F0", "1F1", "1B0", "1B1")],
    )
    with pytest.raises(
        ScheduleError, match="rank 0 at 0B0, waiting for 1B0; rank 1 at 1F1, waiting for 0F1"
    ):
        simulate(crossed)
    with pytest.raises(ScheduleError, match="never finish"):
        lower(crossed)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0F0", "0F1", "0B0"], "stage 0, microbatch 1 has F"),
        (["0F0", "0F1", "0B0", "0B0"], "0B0 stands twice"),
        (["0B0", "0F0", "0F1", "0B1"], "0B0 comes before 0F0"),
        (["0F0", "0F1", "0B0", "1B1"], "1B1 stands on rank 0, but stage 1 is on rank 1"),
        (["0F0", "0F7"], "0F7 lies outside"),
        (["0F0", "0F1", "0B1", "0B0"], "0B1 comes before 0B0"),
        (["0F"], "0F lacks its microbatch"),
        (["0REDUCE_GRAD1"], "0REDUCE_GRAD1 must not name a microbatch"),
    ],
)
def test_malformed_rows_are_named(row: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        _with_row(SCHEDULES["gpipe"](2, 2), 0, [Action.parse(text) for text in row]).validate()


@pytest.mark.parametrize(
    ("rank", "old", "new", "message"),
    [
        (0, "0SEND_F1", "", "1RECV_F1 has no send"),
        (1, "1RECV_F1", "", "0SEND_F1 has no receive"),
        (
            1,
            "1RECV_F0 1F0 1B0 1RECV_F1",
            "1RECV_F1 1F0 1B0 1RECV_F0",
            "1RECV_F1 would receive 0SEND_F0",
        ),
        (1, "1SEND_B1", "1SEND_B1 1SEND_F0", "1SEND_F0 has no partner"),
    ],
)
def test_broken_messages_are_named(rank: int, old: str, new: str, message: str) -> None:
    lowered = lower(SCHEDULES["1f1b"](2, 2))
    text = " ".join(map(str, lowered.actions[rank]))
    assert old in text
    broken = _with_row(
        lowered, rank, [Action.parse(word) for word in text.replace(old, new).split()]
    )
    with pytest.raises(ScheduleError, match=message):
        broken.validate()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0UNSHARD_B0 ", "", "0B0 comes before 0UNSHARD_B0"),
        ("0UNSHARD_F0 0F0", "0F0 0UNSHARD_F0", "0F0 comes before 0UNSHARD_F0"),
        (" 0RESHARD", "", "rank 0 ends before 0RESHARD"),
        ("0UNSHARD_B0", "0UNSHARD_B", "0UNSHARD_B lacks its microbatch"),
    ],
)
def test_misplaced_gathers_are_named(old: str, new: str, message: str) -> None:
    lowered = lower(SCHEDULES["1f1b"](1, 2), sharded=True)
    text = " ".join(map(str, lowered.actions[0]))
    assert old in text
    broken = [Action.parse(word) for word in text.replace(old, new).split()]
    with pytest.raises(ScheduleError, match=message):
        _with_row(lowered, 0, broken).validate()


def test_two_stages_of_a_rank_are_not_gathered_at_once() -> None:
    rows = [["0F0", "1F0", "1B0", "0B0"]]
    schedule = Schedule(2, 1, (0, 0), tuple(tuple(map(Action.parse, row)) for row in rows))
    lowered = lower(schedule, sharded=True)
    row = [action for action in lowered.actions[0] if action != Action(K.RESHARD, 0)]
    with pytest.raises(ScheduleError, match="1UNSHARD_F0 comes before 0RESHARD"):
        _with_row(lowered, 0, row).validate()


def test_a_message_lost_on_both_sides_is_named() -> None:
    lowered = lower(SCHEDULES["1f1b"](2, 2))
    for rank, lost in ((0, "0SEND_F1"), (1, "1RECV_F1")):
        lowered = _with_row(lowered, rank, [a for a in lowered.actions[rank] if str(a) != lost])
    with pytest.raises(ScheduleError, match="stage 1 never receives microbatch 1"):
        lowered.validate()
    with pytest.raises(ScheduleError, match="rank 1 at 1F1, waiting for 1RECV_F1"):
        simulate(lowered)


def test_crossing_sends_deadlock_only_if_sends_block() -> None:
    """Check two ranks that both send before they receive.

    Buffers or non-blocking sends allow this. The lowering must never need it.
    """
    lowered = lower(SCHEDULES["1f1b"](2, 2))
    text = " ".join(map(str, lowered.actions[1])).replace("1RECV_F1 1SEND_B0", "1SEND_B0 1RECV_F1")
    crossed = _with_row(lowered, 1, [Action.parse(word) for word in text.split()])
    simulate(crossed)
    with pytest.raises(
        ScheduleError,
        match="rank 0 at 0SEND_F1, waiting for 1RECV_F1; rank 1 at 1SEND_B0, waiting for 0RECV_B0",
    ):
        simulate(crossed, rendezvous=True)


def test_misplaced_stages_and_doubled_links_are_refused() -> None:
    schedule = SCHEDULES["gpipe"](2, 1)
    with pytest.raises(ScheduleError, match="rank_of_stage"):
        dataclasses.replace(schedule, rank_of_stage=(0, 2)).validate()
    with pytest.raises(ScheduleError, match="share"):
        dataclasses.replace(schedule, links=(Link(0, 1, 0), Link(1, 0, 0))).validate()
    with pytest.raises(ScheduleError, match="lowered before"):
        lower(lower(schedule))


def test_split_backward_runs_too() -> None:
    """Simulate I and W in place of B.

    The input gradients leave early, the weight gradients fill the end.
    """
    rows = [
        [Action.parse(t) for t in ("0F0", "0F1", "0I0", "0W0", "0I1", "0W1")],
        [Action.parse(t) for t in ("1F0", "1I0", "1F1", "1I1", "1W0", "1W1")],
    ]
    schedule = dataclasses.replace(SCHEDULES["gpipe"](2, 2), actions=tuple(map(tuple, rows)))
    lowered = lower(schedule)
    assert lowered.arming == {Action(K.W, 0, 1), Action(K.W, 1, 1)}
    simulate(lowered, rendezvous=True)


def test_drawings() -> None:
    timeline = simulate(SCHEDULES["1f1b"](2, 2), Cost(forward=1, backward=2))
    assert draw_text(timeline).splitlines() == [
        "rank 0  F0 F1  ·  · B0───  · B1───",
        "rank 1   · F0 B0─── F1 B1───  ·  ·",
        "bubble 33.3%",
    ]
    svg = draw_svg(timeline, "two ranks")
    assert svg.count("<title>") == 8 and "bubble 33.3%" in svg
    assert len(list(ElementTree.fromstring(draw_svg(timeline, "a < b & c")).iter())) > 16


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.svg"
    assert main(["1f1b", "--ranks", "4", "--microbatches", "8", "--svg", str(target)]) == 0
    out = capsys.readouterr().out
    assert "0.2727 simulated, 0.2727 by" in out and "4 3 2 1 microbatches" in out
    assert target.read_text().startswith("<svg") and [p.name for p in tmp_path.iterdir()] == [
        "out.svg"
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["1f1p"], "did you mean 1f1b"),
        ([], "name a schedule"),
        (["gpipe", "--ranks", "0"], "at least 1 rank"),
        (["gpipe", "--rank", "2"], "did you mean --ranks"),
        (["gpipe", "--ranks", "four"], "four"),
        (["gpipe", "--forward-cost", "-1"], "must be more than 0"),
        (["gpipe", "--backward-cost", "nan"], "must be more than 0"),
        (["gpipe", "--svg", ""], "--svg '' is empty"),
        (["gpipe", "--svg", "/nowhere/x.svg"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
