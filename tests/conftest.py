"""Suites behind marks: a plain `pytest` runs the law suite, CI runs the rest as well.

A mark is chosen by `pytest -m emulator`; it replaces the selection of pyproject.toml.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi_helpers import end_launches

# A background job of a script, or one under nohup, begins with these ignored. Programs keep it so,
# and children inherit it: the tests of signals would wait for nothing.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Beginning of a test's path under tests/ -> the mark of its suite.
SUITES = {
    "kernels/test_attention_cuda": "emulator",
    "kernels/test_attention_hopper": "emulator",
    "kernels/test_emulator": "emulator",
    "kernels/test_gpu_check": "emulator",
    "kernels/test_mutations": "mutations",
    "programs/test_train_emulated": "emulator",
    "device/": "standin",
}

# Tests that repeat a fact more slowly: as whole processes, at full length, on more layouts.
SLOW = (
    "test_300_evaluations_and_checkpoints",
    "test_ctrl_c_on_mpirun",
    "test_delayed_weight_gradients_under",
    "test_every_layout_reports_the_same_loss",
    "test_float32_adamw",
    "test_kernels_times_every_implementation",
    "test_parts_of_a_model_are_timed",
    "test_placements_compose_with_other_axes",
    "test_recompute_changes_no_bit",
    "test_resumed_on_another_mesh_says_so",
    "test_sigterm_of_one_rank",
    "test_the_plan_is_within_a_tenth",
    "test_train_prints_a_table",
)

# Tests of those suites that every run has: one glance at each, a few seconds in all.
ALWAYS = (
    "test_a_fused_projection_is_read_as_it_lies",
    "test_a_fault_is_reported_at_its_line",
    "test_the_kernel_as_it_is_passes[attention-v1",
    "test_planted_bug_is_caught[attention-v1-mask",
    "test_float32_equals_the_cpu[gpt2",
    "test_collectives_equal_those_of_the_host",
    "test_a_step_that_is_not_finite_changes_nothing",
)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """End what a test has started and, having failed, not ended."""
    yield
    end_launches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test the mark of its suite, before pytest selects by marks."""
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root).as_posix()
        suite = next((mark for start, mark in SUITES.items() if path.startswith(start)), None)
        emulated = "emulator:" in item.name
        if item.get_closest_marker("full") or any(name in item.name for name in ALWAYS):
            continue
        if item.name.startswith(SLOW):
            item.add_marker("slow")
        elif suite or emulated:
            item.add_marker(suite or "emulator")
