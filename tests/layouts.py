"""Cells that law 1 is tested on: model kinds crossed with layouts.

Every run of the tests has `QUICK_CELLS`: on two models every pair of factor values of the layouts,
and every model once. The mark `matrix` adds all pairs with the models, a table by hand, a seeded
sample of all cells, all pairs of the wide cells and a share of their triples, another one each day.
The mark `full` holds all cells.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from training_helpers import BASE, MODELS, Layout

Cell = tuple[str, Layout]
AnyCell = TypeVar("AnyCell", bound=tuple)  # type: ignore[type-arg]

ALONE = [
    *(Layout(dp=n) for n in (2, 4, 8)),
    *(Layout(tp=n, sp=sp) for n in (2, 4) for sp in (False, True)),
    *(Layout(num_microbatches=m) for m in (2, 4)),
    *(
        Layout(pp=2, schedule=s, num_microbatches=m)
        for s in ("gpipe", "1f1b")
        for m in (1, 2, 4, 8)
    ),
    *(Layout(pp=4, schedule=s, num_microbatches=m) for s in ("gpipe", "1f1b") for m in (1, 4)),
    *(Layout(pp=2, stage_layers=split, num_microbatches=4) for split in ("1,3", "3,1")),
    Layout(pp=3, stage_layers="1,2,1", num_microbatches=2),
]

PAIRS = [
    *(Layout(dp=2, tp=2, sp=sp, num_microbatches=2) for sp in (False, True)),
    *(Layout(dp=2, pp=2, schedule=s, num_microbatches=4) for s in ("gpipe", "1f1b")),
    *(
        Layout(tp=2, pp=2, sp=sp, schedule=s, num_microbatches=4)
        for sp in (False, True)
        for s in ("gpipe", "1f1b")
    ),
    Layout(dp=4, tp=2),
    Layout(dp=2, tp=4, sp=True),
    Layout(dp=4, pp=2, num_microbatches=2),
    Layout(tp=4, pp=2, sp=True, num_microbatches=2),
    Layout(tp=2, pp=4, num_microbatches=4),
    Layout(dp=2, pp=4, num_microbatches=8, schedule="gpipe"),
]

TRIPLES = [
    *(
        Layout(dp=2, tp=2, pp=2, sp=sp, schedule=s, num_microbatches=m)
        for sp, s, m in (
            (False, "gpipe", 4),
            (True, "1f1b", 4),
            (True, "gpipe", 1),
            (False, "1f1b", 8),
        )
    ),
    Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2, stage_layers="3,1"),
]


def fits(model: str, layout: Layout) -> bool:
    """Tell if tensor and sequence parallelism can cut the model."""
    if model == "lstm":
        return not layout.sp
    return model != "two-towers" or layout.tp <= 4


TABLE: list[Cell] = [
    *zip(itertools.cycle(("gpt2", "llama")), (*ALONE, *PAIRS, *TRIPLES), strict=False),
    # The remaining model options, each on a layout that uses every axis.
    *(
        (model, layout)
        for model in MODELS
        for layout in (TRIPLES[1], TRIPLES[0], Layout(pp=2, num_microbatches=2))
        if fits(model, layout)
    ),
]


def all_layouts() -> list[Layout]:
    """Return every layout of up to 8 ranks, with every schedule and 1 to 8 microbatches."""
    sizes = (1, 2, 4, 8)
    return [
        Layout(dp=dp, tp=tp, pp=pp, sp=sp, schedule=schedule, num_microbatches=m)
        for dp, tp, pp, sp, schedule, m in itertools.product(
            sizes, sizes, (1, 2, 4), (False, True), ("gpipe", "1f1b"), (1, 2, 4, 8)
        )
        if dp * tp * pp <= 8
        and dp * m <= BASE["batch"]
        and not (sp and tp == 1)
        and not (schedule == "gpipe" and pp == 1)
    ]


def all_cells() -> list[Cell]:
    """Return every model on every layout that it fits."""
    return [(m, at) for at in all_layouts() for m in MODELS if fits(m, at)]


# A wide cell has three further factors: a schedule that replaces the layout's ("" for none), the
# method of data parallelism, and what is recomputed.
WideCell = tuple[str, Layout, str, str, str]
PLACEMENTS = ("", "split", "interleaved", "v", "v-split")
METHODS = ("all-reduce", "node", "nodes", "server", "sharded")
RECOMPUTE = ("none", "selective", "full")


def wide_cells() -> list[WideCell]:
    """Return every cell of all factors."""
    return [
        (model, at, placement, method, recompute)
        for at, model, placement, method, recompute in itertools.product(
            all_layouts(), MODELS, PLACEMENTS, METHODS, RECOMPUTE
        )
        if fits(model, at)
        and (recompute == "none" or model != "two-towers")
        # Four layers: two ranks have two stages each, four ranks one. One name for a replaced one.
        and (not placement or (at.schedule == "1f1b" and at.pp > 1))
        and (placement in ("", "split") or at.pp == 2)
        # A node holds all ranks, or half of them and several replicas.
        and (method == "all-reduce" or at.dp > 1)
        and (method != "nodes" or at.pp > 1 or at.dp > 2)
    ]


def factors(cell: Cell | WideCell) -> tuple[tuple[str, object], ...]:
    """Return the factor values of a cell."""
    model, layout, *more = cell
    placement, *rest = more or [""]
    return (
        ("model", model),
        ("dp", layout.dp),
        ("tp", layout.tp),
        ("pp", layout.pp),
        ("sp", layout.sp),
        ("schedule", (placement or layout.schedule) if layout.pp > 1 else "none"),
        ("microbatches", layout.num_microbatches),
        *zip(("method", "recompute"), rest, strict=False),
    )


def covering(cells: Sequence[AnyCell], strength: int) -> list[AnyCell]:
    """Return few cells in which every `strength` factor values occur that any cell combines.

    Greedy and deterministic: the cell with the most new combinations comes next, the first of
    several; small meshes come first. A gain only falls, so the last counts are upper bounds, and
    only the cells at the top are counted again.
    """
    ordered = sorted(cells, key=lambda cell: cell[1].num_ranks)
    combined, number = combinations_of(ordered, strength)
    missing = np.ones(number, bool)
    most = np.full(len(ordered), combined.shape[1])
    chosen: list[AnyCell] = []
    left = number
    while left:
        top = np.flatnonzero(most == most.max())[:64]  # the first of them mostly stands
        most[top] = missing[combined[top]].sum(1)
        best = top[most[top].argmax()]
        if most[best] == most.max() and not (most[:best] == most[best]).any():
            chosen.append(ordered[best])
            left -= int(most[best])
            missing[combined[best]] = False
    return chosen


def combinations_of(cells: Sequence[AnyCell], strength: int) -> tuple[np.ndarray, int]:
    """Return the numbers of each cell's combinations [cells, combinations], and their count."""
    columns = []
    for values in zip(*(factors(cell) for cell in cells), strict=True):
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        columns.append((np.array([numbers[value] for value in values]), len(numbers)))
    combined, first = [], 0
    for chosen in itertools.combinations(columns, strength):
        index = np.ravel_multi_index([column for column, _ in chosen], [size for _, size in chosen])
        _, dense = np.unique(index, return_inverse=True)
        combined.append(first + dense)
        first += int(dense.max()) + 1
    return np.stack(combined, 1), first


def sampled_cells(count: int, seed: int) -> list[Cell]:
    """Return `count` of all cells, drawn with `seed`."""
    return random.Random(seed).sample(all_cells(), count)


OTHERS = ("bert", "seq2seq", "lstm", "two-towers")  # families besides the decoders


def quick_cells() -> list[Cell]:
    """Return the cells of every run.

    Eight microbatches or ranks of one axis cost as much as several other cells: each factor value
    stands once.
    """
    small = [(model, at) for model, at in all_cells() if at.num_microbatches < 8 and at != Layout()]
    two = [c for c in small if c[0] in ("gpt2", "llama") and max(c[1].dp, c[1].tp) < 8]
    others = [c for c in small if c[0] not in ("gpt2", "llama", *OTHERS)]
    # Of the other families, tests of their own compare meshes in every run.
    every_axis = Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2)
    return [*covering(two, 2), *covering(others, 1), ("bert", every_axis)]


QUICK_CELLS = quick_cells()
MATRIX_CELLS = [
    cell for cell in dict.fromkeys([*covering(all_cells(), 2), *TABLE]) if cell not in QUICK_CELLS
]
WIDE_PAIRS = covering(wide_cells(), 2)
WIDE_TRIPLES = [cell for cell in covering(wide_cells(), 3) if cell not in WIDE_PAIRS]
