"""Line about affinity masks: cores, the flag that widens them, and at most 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi_helpers import family, finish, needs_mpirun, start

from minillm.base.log import paragraph
from minillm.base.number_ranges import ranges, read_ranges
from minillm.comm import binding
from minillm.comm.binding import bound_words, machine_cores, narrowest, wider
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks

HYDRA = {"PMI_SIZE": "4", "HYDI_CONTROL_FD": "7"}
PRTE = {"OMPI_COMM_WORLD_SIZE": "4"}
OPEN_MPI, MPICH = "--bind-to none or --map-by :PE=N", "-bind-to none or -bind-to core:N"


@pytest.mark.parametrize(
    ("environment", "flag"),
    [
        (HYDRA, MPICH),
        (PRTE, OPEN_MPI),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "--cpu-bind=none or -c N"),
        ({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, "--cpu-bind=none or -c N"),
        ({"SLURM_STEP_NUM_TASKS": "2", **HYDRA}, MPICH),  # mpirun that starts proxies by srun
        ({"SLURM_STEP_NUM_TASKS": "2", **PRTE}, OPEN_MPI),
        ({}, "taskset -c 0-3"),
    ],
)
def test_the_flag_is_that_of_the_launcher(environment: dict[str, str], flag: str) -> None:
    assert wider({0, 1, 2, 3}, environment) == flag


@pytest.mark.parametrize(
    ("masks", "cores", "words"),
    [
        ([{0, 1}], [2], "0,1, all of this machine"),
        ([set(range(64))] * 8, [64] * 8, "0-63, all of this machine, shared by 8 ranks"),
        ([{4, 5, 6}], [8], "4-6 of 8; wider: FLAG0"),
        ([set(range(8)), {3}, {4}], [8] * 3, "rank 1: 3 of 8; wider: FLAG1"),
        ([{0, 1}, {0, 1, 2, 3}], [2, 8], "rank 1: 0-3 of 8; wider: FLAG1"),  # rank 0 has it all
        ([set(range(0, 128, 2))], [128], "64 cores of 128; wider: FLAG0"),
    ],
)
def test_the_narrowest_mask_is_shown(masks: list[set[int]], cores: list[int], words: str) -> None:
    hints = [f"FLAG{rank}" for rank in range(len(masks))]
    assert bound_words([sorted(mask) for mask in masks], cores, hints, True) == words


def test_ranks_of_several_machines_share_none() -> None:
    words = bound_words([range(4)] * 2, [4] * 2, ["", ""], False)
    assert words == "0-3, all of each machine"


@pytest.mark.parametrize("flag", [*binding._WIDER.values(), "taskset -c 1000-1200"])
def test_the_longest_line_has_80_columns(flag: str) -> None:
    masks = [range(8192)] * 1023 + [range(1000, 1200)]
    line = bound_words(masks, [8192] * 1024, [flag] * 1024, True)
    assert line.startswith("rank 1023: 1000-1199 of 8192; wider: ")
    assert "\n" not in paragraph("cores", line)


def test_cores_are_those_of_the_containers_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(binding, "affinity", lambda: {2, 3})
    assert machine_cores(tmp_path) == set(range(16))
    for version, name in (
        (1, "sys/fs/cgroup/cpuset/cpuset.cpus"),
        (2, "sys/fs/cgroup/cpuset.cpus.effective"),
    ):
        root = tmp_path / str(version)
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("0-5,8\n")
        assert machine_cores(root) == {0, 1, 2, 3, 4, 5, 8}
        (root / name).write_text("\n")  # an empty set inherits
        assert machine_cores(root) == set(range(16))


def test_ranges_are_read_back() -> None:
    numbers = {0, 1, 2, 5, 7, 8, 9, 10}
    assert read_ranges(ranges(numbers)) == numbers
    assert read_ranges("0-1,4\n") == {0, 1, 4}
    with pytest.raises(ValueError):
        read_ranges("all")


def test_ranks_tell_the_narrowest_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "affinity", lambda: {5})
    monkeypatch.setattr(binding, "machine_cores", lambda: set(range(8)))
    monkeypatch.setattr(binding, "wider", lambda machine: "FLAG")

    def program(comm: Communicator) -> str:
        return narrowest(comm)

    assert run_ranks(3, program) == ["rank 0: 5 of 8; wider: FLAG"] * 3


SHOW = (
    "import os; from minillm.comm.binding import own_words as w; os.write(1, f'{w()}\\n'.encode())"
)


@needs_mpirun
@pytest.mark.slow
@pytest.mark.skipif(len(binding.affinity()) < 2, reason="needs two cores")
def test_the_flag_widens_what_mpirun_binds() -> None:
    """Bind by a flag, and take the binding away by the flag that the line names."""
    dash = "--" if family() == "Open MPI" else "-"
    narrow = run(2, [f"{dash}bind-to", "core"])
    assert all("; wider: " in line for line in narrow)
    flag = narrow[0].partition("wider: ")[2].partition(" or ")[0]
    assert all("all of this machine" in line for line in run(2, flag.split()))


def run(n: int, flags: list[str]) -> list[str]:
    """Return the lines of `n` ranks that mpirun starts with `flags`."""
    done = finish(start(n, ["-c", SHOW], flags=flags))
    assert done.returncode == 0, done.output
    return done.output.splitlines()
