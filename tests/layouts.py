"""Cells that law 1 is tested on: model kinds crossed with layouts.

`QUICK_CELLS` is a covering array: every pair of factor values occurs in one of its cells. Every run
of the tests has it. `MATRIX_CELLS` adds a table by hand, and a covering array of all triples, and
`sampled_cells` draws from all cells with a seed: the mark `matrix`. All cells: the mark `full`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from training_helpers import BASE, MODELS, Layout

Cell = tuple[str, Layout]

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

TABLE: list[Cell] = [
    *((model, layout) for layout in ALONE for model in ("gpt2", "llama")),
    *((model, layout) for layout in PAIRS for model in ("gpt2", "llama")),
    *((model, layout) for layout in TRIPLES for model in ("gpt2", "llama")),
    # The remaining model options, each on a layout that uses every axis.
    *(
        (model, layout)
        for model in ("gpt2-untied", "llama-tied", "sinusoidal", "relu")
        for layout in (TRIPLES[1], Layout(pp=2, num_microbatches=2))
    ),
]


def all_layouts() -> list[Layout]:
    """Every layout of up to 8 ranks, with every schedule and several numbers of microbatches."""
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


def kv_heads_divide(model: str, layout: Layout) -> bool:
    """Whether each tensor-parallel rank of the layout gets a key-value head of the model."""
    return MODELS[model].get("kv_heads", BASE["heads"]) % layout.tp == 0


def all_cells() -> list[Cell]:
    """Return every model on every layout that it fits."""
    return [(m, at) for at in all_layouts() for m in MODELS if kv_heads_divide(m, at)]


def factors(cell: Cell) -> tuple[tuple[str, object], ...]:
    """Return the factor values of a cell."""
    model, layout = cell
    axes = (("model", model), ("dp", layout.dp), ("tp", layout.tp), ("pp", layout.pp))
    return (
        *axes,
        ("sp", layout.sp),
        ("schedule", layout.schedule if layout.pp > 1 else "none"),
        ("microbatches", layout.num_microbatches),
    )


def covering(cells: Sequence[Cell], strength: int) -> list[Cell]:
    """Return few cells in which every `strength` factor values occur that any cell combines.

    Greedy and deterministic: the cell with the most new combinations comes next, the first of
    several; small meshes come first.
    """
    left = {cell: set(itertools.combinations(factors(cell), strength)) for cell in cells}
    order = sorted(left, key=lambda cell: cell[1].num_ranks)
    chosen: list[Cell] = []
    missing = set().union(*left.values())
    while missing:
        best = max(order, key=lambda cell: len(left[cell] & missing))
        chosen.append(best)
        missing -= left[best]
    return chosen


def sampled_cells(count: int, seed: int) -> list[Cell]:
    """Return `count` of all cells, drawn with `seed`."""
    return random.Random(seed).sample(all_cells(), count)


QUICK_CELLS = covering(all_cells(), 2)
MATRIX_CELLS = [
    cell for cell in dict.fromkeys([*TABLE, *covering(all_cells(), 3)]) if cell not in QUICK_CELLS
]
