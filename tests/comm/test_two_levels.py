"""All-reduce in two levels: sums, order, bytes, and the placements where it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import Layout, assert_same, reference, train

from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.comm.two_levels import TwoLevels, by_levels


def nodes_of(ways: int, number: int) -> list[int]:
    return [rank // ways for rank in range(ways * number)]


def drawn(rank: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, rank)).normal(size=size).astype(np.float32)


def check_sum(ways: int, number: int, size: int, seed: int) -> None:
    """Compare with the sums of the nodes, each in rank order, added in the order of the nodes."""

    def rank(comm: Communicator) -> np.ndarray:
        levels = by_levels(comm)
        assert isinstance(levels, TwoLevels) and levels.size == comm.size
        return levels.all_reduce_(drawn(comm.rank, size, seed))

    total = np.zeros(size, np.float32)
    for node in range(number):
        inside = drawn(node * ways, size, seed)
        for place in range(1, ways):
            inside += drawn(node * ways + place, size, seed)
        total = inside if node == 0 else total + inside
    for found in run_ranks(ways * number, rank, nodes=nodes_of(ways, number)):
        np.testing.assert_array_equal(found, total)


@settings(max_examples=15, deadline=None)
@given(
    ways=st.integers(2, 4),
    number=st.integers(2, 3),
    size=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_the_sum_is_that_of_the_nodes_in_order(
    ways: int, number: int, size: int, seed: int
) -> None:
    check_sum(ways, number, size, seed)


def check_order() -> None:
    """Launch sums of equal size together, and poll them in another order on every rank."""

    def rank(comm: Communicator) -> list[np.ndarray]:
        levels, draw = by_levels(comm), np.random.default_rng(comm.rank)
        arrays = [np.full(5, 10.0**i * (comm.rank + 1)) for i in range(6)]
        works = [levels.iall_reduce_(array) for array in arrays]
        waiting = list(range(6))
        while waiting:
            index = int(draw.choice(waiting))
            if draw.random() < 0.1:
                works[index].wait()
            if works[index].test():
                waiting.remove(index)
        return arrays

    for arrays in run_ranks(6, rank, nodes=nodes_of(2, 3), timeout=10):
        for i, array in enumerate(arrays):
            np.testing.assert_allclose(array, 10.0**i * 21, rtol=1e-12)


def test_sums_in_flight_are_not_confused() -> None:
    check_order()


def in_any_order(levels: TwoLevels) -> None:
    """Move the sums that are done to the next level, the newest first on odd ranks."""
    for level, line in enumerate(levels._lines):
        done = [each for each in line if each.work.test()]
        for each in reversed(done) if levels.place else done:
            line.remove(each)
            line.appendleft(each)
            levels._rise(level)


def leave_out_a_rank(levels: TwoLevels, level: int) -> None:
    """Lose the part of the last rank of a node."""
    if level == 0 and levels.place == levels.ways - 1:
        levels._lines[0][0].part[...] = 0
    rise(levels, level)


rise = TwoLevels._rise


@pytest.mark.parametrize(
    ("name", "fault", "law"),
    [
        ("advance", in_any_order, check_order),
        ("_rise", leave_out_a_rank, lambda: check_sum(2, 2, 9, 0)),
    ],
)
def test_planted_faults_are_seen(
    name: str, fault: Any, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TwoLevels, name, fault)
    with pytest.raises(AssertionError):
        law()


@pytest.mark.parametrize("size", [12, 13, 1])
def test_bytes_by_level(size: int) -> None:
    """Check 2 n (q - 1) / q within a node and 2 p (N - 1) / N between nodes, p the rank's part."""
    ways, number, item = 3, 2, 8

    def rank(comm: Communicator) -> Any:
        levels = by_levels(comm)
        before = ledger().snapshot()
        levels.all_reduce_(np.ones(size))
        return {key: (row.bytes, row.wire) for key, row in ledger().since(before).items()}

    parts = [4, 4, 4] if size == 12 else [4, 4, 5] if size == 13 else [0, 0, 1]
    ranks = run_ranks(ways * number, rank, nodes=nodes_of(ways, number))
    inside = size * item * (ways - 1) / ways
    for place, found in zip(parts * number, ranks, strict=True):
        outside = (place * item, pytest.approx(2 * place * item * (number - 1) / number))
        assert found == {
            ("world in node", "reduce_scatter", "payload"): (size * item, pytest.approx(inside)),
            ("world in node", "all_gather", "payload"): (size * item, pytest.approx(inside)),
            ("world between nodes", "all_reduce", "payload"): outside,
        }
    sent = sum(wire for found in ranks for _, wire in found.values())
    assert sent == pytest.approx(2 * size * item * (ways * number - 1))  # of a direct one as well


@pytest.mark.parametrize(
    ("nodes", "levels"),
    [
        ([0, 0, 1, 1], True),
        ([5, 5, 2, 2, 7, 7], True),
        ([0, 0, 0, 0], False),
        ([0, 1, 2, 3], False),
        ([0, 1, 0, 1], False),
        ([0, 0, 0, 1], False),
        ([0, 0, 1, 1, 2, 3], False),
    ],
)
def test_nodes_of_equally_many_neighbours_are_used(nodes: list[int], levels: bool) -> None:
    def kind(comm: Communicator) -> bool:
        return isinstance(by_levels(comm), TwoLevels)

    assert run_ranks(len(nodes), kind, nodes=nodes) == [levels] * len(nodes)


# ---- in training


@pytest.mark.parametrize(
    ("layout", "nodes"),
    [
        (Layout(dp=4, num_microbatches=2), [0, 0, 1, 1]),
        (Layout(dp=4, tp=2, sp=True), [0, 0, 0, 0, 1, 1, 1, 1]),
        pytest.param(
            Layout(dp=4, pp=2, num_microbatches=2),
            [0, 0, 1, 1, 2, 2, 3, 3],
            marks=pytest.mark.matrix,
        ),
    ],
    ids=str,
)
def test_training_equals_one_rank(layout: Layout, nodes: list[int]) -> None:
    found = train("gpt2", layout, optimizer="adamw", nodes=nodes)
    assert_same(found, reference("gpt2", "adamw"), 1e-9)


def test_training_has_the_bits_of_memory_shared_within_nodes() -> None:
    """Check equal bits: both sum a node in rank order, then the nodes. Nothing is clipped."""
    runs = [
        train(
            "gpt2",
            Layout(dp=4),
            optimizer="adamw",
            dtype="float32",
            clip=1e9,
            nodes=[0, 0, 1, 1],
            node_shared=shared,
        )
        for shared in ("on", "off")
    ]
    assert runs[0].losses == runs[1].losses
    for name, weight in runs[0].weights.items():
        np.testing.assert_array_equal(weight, runs[1].weights[name], err_msg=name)
