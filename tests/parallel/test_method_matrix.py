"""Every method of data parallelism on every kind of layout: the laws of `method_cells`."""

from __future__ import annotations

import itertools

import pytest
from layouts import covering, factors
from method_cells import MethodCell, check_cell, method_cells, nodes_of, run_cell

from minillm.comm.threads import run_ranks

CELLS = method_cells()
# The methods' own tests have the others in every run. The mark adds all pairs.
OFTEN = ("two levels", "zero3 by 2", "sync by 1", "async by 2", "fragments", "powersgd", "topk")
OFTEN += ("onebit", "bf16", "balance zero1")
QUICK = covering([cell for cell in CELLS if cell[3] in OFTEN], 1)
PAIRS = [cell for cell in covering(CELLS, 2) if cell not in QUICK]


def name_of(cell: MethodCell) -> str:
    model, layout, _, method = cell
    return f"{method.replace(' ', '_')}-{model}-{layout}"


def check(cell: MethodCell) -> None:
    nodes = nodes_of(cell)
    check_cell(cell, run_ranks(len(nodes), lambda comm: run_cell(comm, cell), nodes=nodes))


def test_pairs_are_covered() -> None:
    """Check by brute force that every two values that a cell combines are in a chosen cell."""
    chosen = [set(factors(cell)) for cell in [*QUICK, *PAIRS]]
    wanted = {pair for cell in CELLS for pair in itertools.combinations(factors(cell), 2)}
    assert all(any(chosen_in >= set(pair) for chosen_in in chosen) for pair in wanted)


@pytest.mark.parametrize("cell", QUICK, ids=name_of)
def test_methods_keep_their_laws(cell: MethodCell) -> None:
    check(cell)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", PAIRS, ids=name_of)
def test_every_pair_keeps_its_law(cell: MethodCell) -> None:
    check(cell)


@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_every_cell_keeps_its_law(cell: MethodCell) -> None:
    check(cell)
