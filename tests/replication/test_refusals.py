"""Refused options of data parallelism: one table of every refused pair and every check."""

from __future__ import annotations

import ast
import itertools
import json
import traceback
from pathlib import Path
from typing import Any

import pytest

import minillm
from minillm.base.errors import ConfigError
from minillm.training import conflicts
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve

SOURCES = Path(minillm.__file__).parent
RANKS = 4
ANY_ZERO, ANY_CODEC = "--zero 1/2/3", "--compress bf16/powersgd/topk/onebit"
ANY_SERVER = "--server sync/async/stale"
TWO = "do not go together: each is a data-parallel method of its own; leave one out. "
ON_HOST = "needs --device cpu"
SHRINK, TOGETHER = "--on-failure shrink and", "do not go together"

# Flags, with alternatives of a value, and words of the error as a regular expression.
REFUSED: list[tuple[str, str]] = [
    # Two methods. The error says with what each of them goes.
    (f"--node-shared on {ANY_ZERO}", rf"--zero \d and --node-shared on {TWO}--zero goes with --tp"),
    (f"--node-shared on {ANY_SERVER}", f"--server .* and --node-shared on {TWO}--server goes with"),
    ("--node-shared on --local-steps 2", f"--local-steps 2 and --node-shared on {TWO}"),
    (f"--node-shared on {ANY_CODEC}", f"--compress .* and --node-shared on {TWO}"),
    (f"{ANY_ZERO} {ANY_SERVER}", rf"--server \w+ and --zero \d {TWO}--server goes with --tp"),
    (f"{ANY_ZERO} --local-steps 2", rf"--local-steps 2 and --zero \d {TWO}"),
    (f"{ANY_ZERO} {ANY_CODEC}", rf"--compress \w+ and --zero \d {TWO}--compress goes with --tp"),
    (f"{ANY_SERVER} --local-steps 2", rf"--local-steps 2 and --server \w+ {TWO}"),
    (f"{ANY_SERVER} {ANY_CODEC}", rf"--compress \w+ and --server \w+ {TWO}"),
    (f"--local-steps 2 {ANY_CODEC}", rf"--compress \w+ and --local-steps 2 {TWO}"),
    # Deals by speed need a method that reduces once a step.
    ("--balance speed --zero 2/3", r"--balance speed and --zero \d do not .*--zero 1, and with"),
    (f"--balance speed {ANY_SERVER}", r"--balance speed and --server \w+ do not go together"),
    ("--balance speed --local-steps 2", "--balance speed and --local-steps 2 do not go together"),
    (f"--balance speed {ANY_CODEC}", r"--balance speed and --compress \w+ do not go together"),
    # Options of one method, without it or with another value of its option.
    ("--shard-group 2", "--shard-group 2 needs --zero$"),
    ("--servers 1/2", r"--servers \d needs --server$"),
    ("--staleness 2", "--staleness 2 needs --server stale$"),
    ("--staleness 2 --server sync/async", r"--staleness 2 needs --server stale, not --server \w+$"),
    ("--outer-lr 1.0", "--outer-lr 1.0 needs --local-steps$"),
    ("--outer-momentum 0.5", "--outer-momentum 0.5 needs --local-steps$"),
    ("--fragments 2", "--fragments 2 needs --local-steps$"),
    ("--compress-rank 2", "--compress-rank 2 needs --compress powersgd$"),
    ("--compress-rank 2 --compress bf16/topk/onebit", r"needs --compress powersgd, not --compress"),
    ("--compress-share 0.5", "--compress-share 0.5 needs --compress topk$"),
    ("--compress-share 0.5 --compress bf16/powersgd/onebit", "needs --compress topk, not"),
    # Sizes that do not fit the ranks or the steps.
    ("--zero 1/2/3 --shard-group 3", "does not divide the 4 data-parallel ranks; choose one of"),
    ("--local-steps 4 --fragments 3", "does not divide --local-steps 4.*choose one of 1, 2, 4"),
    ("--local-steps 30 --steps 100", "the last 10 would never be averaged; use --steps 120"),
    ("--server sync --servers 4", "--servers 4 leaves no worker: 4 ranks run; use mpirun -n 5"),
    ("--server sync --servers 1 --dp 4", "3 ranks run besides 1 that serves; use mpirun -n 5"),
    ("--slow-rank 4:2", "no rank 4 that computes; choose one of 0 to 3"),
    (
        "--server async/stale --tp 2",
        "--tp 2 --pp 1 needs --servers 1, not 0: .*Use --servers 1",
    ),
    ("--server async/stale --pp 2", "--tp 1 --pp 2 needs --servers 1, not 0: the ranks of a"),
    ("--server async/stale --pp 2 --servers 2", "--tp 1 --pp 2 needs --servers 1, not 2: the"),
    # Going on after losing ranks.
    (f"--on-failure shrink {ANY_ZERO}", rf"{SHRINK} --zero \d {TOGETHER}.* only copy of its share"),
    (f"--on-failure shrink {ANY_SERVER}", rf"{SHRINK} --server \w+ {TOGETHER}.* of its weights"),
    ("--on-failure shrink --local-steps 2", f"{SHRINK} --local-steps 2 {TOGETHER}.* weights and"),
    ("--on-failure shrink --compress bf16", f"{SHRINK} --compress bf16 {TOGETHER}.* microbatches"),
    ("--on-failure shrink --compress powersgd/topk/onebit", f"{SHRINK} .*what it has left unsent"),
    ("--on-failure shrink --node-shared on", f"{SHRINK} --node-shared on {TOGETHER}: memory that"),
    ("--on-failure shrink --balance speed", f"{SHRINK} --balance speed {TOGETHER}: both deal"),
    ("--on-failure shrink --device cuda", f"{SHRINK} --device cuda {TOGETHER}: a GPU runs ahead"),
    ("--on-failure shrink --trace true", f"{SHRINK} --trace {TOGETHER}: a lost rank"),
    ("--on-failure shrink --save-async true", f"{SHRINK} --save-async {TOGETHER}: a lost rank"),
    ("--microbatch-tokens 64", "--microbatch-tokens 64 needs --batch-tokens"),
    ("--on-failure shrink --patience 3", f"{SHRINK} --patience 3 {TOGETHER}: a loss makes"),
    ("--on-failure shrink --buddy-every 2", "--buddy-every 2 needs --buddy"),
    ("--buddy true", "--buddy needs --on-failure shrink or respawn"),
    ("--on-failure shrink --on-spike skip/rewind", r"--on-spike \w+ and --on-failure shrink"),
    ("--balance speed --batch-tokens 64", f"--balance speed and --batch-tokens 64 {TOGETHER}"),
    ("--on-failure restart", "must be one of stop, shrink, respawn"),
    # A GPU, and an optimizer of whole matrices.
    ("--node-shared on --device cuda", f"--node-shared on {ON_HOST}: it shares the host's memory"),
    ("--balance speed --device cuda", f"--balance speed {ON_HOST}: it measures the time of the"),
    ("--server async/stale --device cuda", rf"--server \w+ {ON_HOST}: it works in the host's"),
    ("--server sync --servers 2 --device cuda", f"--server sync {ON_HOST}"),
    (f"--optimizer muon {ANY_SERVER}", r"--optimizer muon and --server \w+ do not go together"),
    # Values alone.
    ("--zero 4", "--zero 4 must be"),
    ("--staleness -1 --server stale", "--staleness -1 must be"),
    ("--local-steps -1", "--local-steps -1 must be"),
    ("--local-steps 2 --outer-momentum 1.0", "--outer-momentum 1.0 must be"),
    ("--local-steps 2 --outer-lr 0.0", "--outer-lr 0.0 must be"),
    ("--compress topk --compress-share 1.0", "--compress-share 1.0 must be"),
    ("--compress powersgd --compress-rank 0", "--compress-rank 0 must be"),
    ("--compress gzip", "must be one of none, bf16, powersgd, topk, onebit"),
    ("--slow-rank 1:0.5", "--slow-rank '1:0.5' must be a rank and a factor from 1"),
    ("--slow-rank one", "--slow-rank 'one' must be"),
]

# Every value of an option that asks for something, each with what it needs.
VALID = (
    *("--node-shared on", "--node-shared off", "--zero 1", "--zero 2", "--zero 3"),
    *("--zero 1 --shard-group 2", "--server sync", "--server async", "--server stale"),
    *("--server sync --servers 2", "--server async --servers 2", "--local-steps 2"),
    *("--local-steps 2 --fragments 2", "--compress bf16", "--compress powersgd"),
    *("--compress topk", "--compress onebit", "--balance speed", "--slow-rank 1:3", "--tp 2"),
    *("--pp 2", "--device cuda", "--optimizer muon", "--on-failure shrink"),
)
DEPENDENT = (
    *("--shard-group 2", "--servers 2", "--staleness 2", "--outer-lr 1.0", "--outer-momentum 0.5"),
    *("--fragments 2", "--compress-rank 2", "--compress-share 0.5"),
)


def flags(text: str) -> dict[str, str]:
    """Return option -> value of a text of flags."""
    words = text.split()
    names = [name.removeprefix("--").replace("-", "_") for name in words[::2]]
    return dict(zip(names, words[1::2], strict=True))


def alternatives(row: str) -> list[dict[str, str]]:
    """Return what a row of the table stands for, one value of each option."""
    names, values = zip(*flags(row).items(), strict=True)
    combined = itertools.product(*(value.split("/") for value in values))
    return [dict(zip(names, chosen, strict=True)) for chosen in combined]


def refusal(options: dict[str, str]) -> ConfigError | None:
    """Return the error that refuses the options on four ranks, None if they are right."""

    def read(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    try:
        resolve(RunConfig().replace(**{k: read(v) for k, v in options.items()}), RANKS, 29)
    except ConfigError as error:
        return error
    return None


CASES = [(options, words) for row, words in REFUSED for options in alternatives(row)]


@pytest.mark.parametrize(
    ("options", "words"), CASES, ids=["-".join(f"{k}={v}" for k, v in o.items()) for o, _ in CASES]
)
def test_refusals(options: dict[str, str], words: str) -> None:
    error = refusal(options)
    assert error is not None, "the options are not refused"
    with pytest.raises(ConfigError, match=words):
        raise error


def test_every_refused_pair_is_in_the_table() -> None:
    """Try all pairs of valid options, and of options that need another with each of them."""
    rows = [set(options.items()) for options, _ in CASES]
    for text in VALID:
        assert refusal(flags(text)) is None, text
    refused = 0
    for one, other in itertools.combinations([*VALID, *DEPENDENT], 2):
        a, b = flags(one), flags(other)
        if any(a[name] != b[name] for name in a.keys() & b.keys()):
            continue
        if refusal(a | b) is not None:
            refused += 1
            assert any(row <= (a | b).items() for row in rows), f"{one} {other} is in no row"
    assert refused > 100


def checks() -> set[tuple[str, int]]:
    """Return file and line of every check of the options of data parallelism.

    That of node_shared.py depends on the machine, and has its own test. Those that `resolve` leaves
    to other functions are about the mesh.
    """
    found = set()
    for path in [*sorted((SOURCES / "replication").glob("*.py")), SOURCES / "training/resolve.py"]:
        tree: ast.AST = ast.parse(path.read_text())
        if path.name == "resolve.py":
            tree = next(n for n in ast.walk(tree) if getattr(n, "name", "") == "resolve")
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and "ConfigError" in ast.unparse(node):
                found.add((str(path), node.lineno))
    return {place for place in found if not place[0].endswith("node_shared.py")}


def test_every_check_is_in_the_table() -> None:
    reached = set()
    for options, _ in CASES:
        error = refusal(options)
        assert error is not None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reached.add((frame.filename, frame.lineno))
    assert len(checks()) > 8
    assert checks() <= reached


def test_every_conflict_is_in_the_table() -> None:
    told = [str(refusal(options)) for options, _ in CASES]
    rows = [*conflicts.needs(RunConfig()), *conflicts.of(RunConfig())]
    assert len(rows) > 10
    for row in rows:
        assert not row.reason or any(row.reason in text for text in told), row
