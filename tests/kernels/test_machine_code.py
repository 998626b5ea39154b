"""The rules of `.ci/compile_kernels` for the machine code of each kernel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from minillm.kernels.gpu import build

PROGRAM = Path(__file__).resolve().parents[2] / ".ci" / "compile_kernels"


def loaded() -> Any:
    """Return the program as a module."""
    loader = importlib.machinery.SourceFileLoader("compile_kernels", str(PROGRAM))
    spec = importlib.util.spec_from_loader("compile_kernels", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


CHECK = loaded()

# As cuobjdump 13 prints it: encodings in comments, predicates, and a listing for each kernel.
LISTING = """
\t\tFunction : wide
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 STG.E.128 desc[UR4][R6.64], R4 ;
        /*0030*/              @P1  STG.E desc[UR4][R8.64], R4 ;
        /*0040*/                   EXIT ;
\t\t..........
\t\tFunction : split
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/             @!UP0 STG.E desc[UR4][R6.64], R4 ;
        /*0020*/                   STG.E desc[UR4][R6.64+0x4], R5 ;
        /*0030*/                   EXIT ;
"""


def test_instructions_are_counted_for_each_kernel() -> None:
    assert CHECK.kernels_of(LISTING) == {
        "wide": ["LDC", "LDG.E.128.CONSTANT", "STG.E.128", "STG.E", "EXIT"],
        "split": ["LDG.E.128", "STG.E", "STG.E", "EXIT"],
    }


def test_a_good_kernel_does_not_hide_a_bad_one() -> None:
    assert CHECK.faults(LISTING, ["* LDG.E.128", "wide STG.E.128 STG.E*2", "split STG.E*2"]) == []
    assert CHECK.faults(LISTING, ["* STG.E.128"]) == ["split has 0 STG.E.128, not 1 or more"]
    assert CHECK.faults(LISTING, ["wide LDG.E.128*2"]) == ["wide has 1 LDG.E.128, not 2 or more"]


@pytest.mark.parametrize("rule", ["norm LDG", "wide"])
def test_a_rule_without_a_kernel_or_an_instruction_is_a_fault(rule: str) -> None:
    assert CHECK.faults(LISTING, [rule]) == [f"no kernel or no instruction in the rule `{rule}`"]


def test_local_memory_is_a_fault() -> None:
    spilled = LISTING.replace("STG.E desc[UR4][R8.64], R4", "STL.64 [R1], R4")
    assert CHECK.faults(spilled, []) == ["wide uses local memory (STL.64)"]


def test_every_file_with_wide_accesses_has_rules() -> None:
    """Check that a file which moves 16 bytes at a time has a rule that says so."""
    for path in build.cuda_files():
        if "vectors.cuh" in path.read_text(encoding="utf-8"):
            assert any(".128" in rule for rule in build.marks(path, "sass")), path
