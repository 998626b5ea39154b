"""The layouts that law 1 is tested on: a small table for every run of the tests, and all of them
for `pytest -m full`."""

from __future__ import annotations

import itertools

from training_helpers import BASE, MODELS, Layout

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

CELLS = [
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
