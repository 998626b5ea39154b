"""Machine code for AVX2: the loops of products keep their sums in its 16 registers."""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from minillm.kernels import native

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions"),
]

JUMP = re.compile(r"j\w+\s+([0-9a-f]+) ")
INSTRUCTION = re.compile(r"\s+([0-9a-f]+):\t(.+)")
FEWEST_SUMS = 9


@functools.cache
def loops() -> list[list[str]]:
    """Return the innermost loops of the extension, each as its instructions."""
    command = ["objdump", "-d", "--no-show-raw-insn", native.extension.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(innermost(text))


def innermost(text: str) -> Iterator[list[str]]:
    found = [match.groups() for match in map(INSTRUCTION.match, text.splitlines()) if match]
    at = {int(address, 16): index for index, (address, _) in enumerate(found)}
    last = -1  # the end of the last loop: one that begins before it contains it
    for index, (_, instruction) in enumerate(found):
        jump = JUMP.match(instruction)
        start = at.get(int(jump[1], 16)) if jump else None
        if start is not None and start <= index:
            if start > last:
                yield [words for _, words in found[start : index + 1]]
            last = index


def test_loops_of_products_do_not_spill() -> None:
    """Hold every loop that adds to many sums at a step: a spilled sum costs a third."""
    products = []
    for loop in loops():
        # Accumulates in the destination; polynomials use the other two forms.
        sums = [words for words in loop if "vfmadd231ps" in words and "ymm" in words]
        if len(sums) >= FEWEST_SUMS and 3 * len(sums) >= len(loop):
            products.append(loop)
    assert len(products) >= 2  # tiles, and few rows
    spilling = [loop for loop in products if any("(%rsp)" in words for words in loop)]
    assert not spilling, "\n".join(spilling[0])
