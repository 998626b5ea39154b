"""The doctor finds what is missing and names a remedy.

A trial start decides whether mpirun and the MPI library belong together.
"""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm import doctor
from minillm.base.requirements import new_enough, parse_requirement
from minillm.comm import commands
from minillm.comm.launchers import LAUNCHERS
from minillm.doctor import Finding, judge_launch, mpi_family, report


def named(findings: Iterator[Finding], subject: str) -> Finding:
    return next(finding for finding in findings if finding.subject == subject)


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "family", "version"),
    [
        (
            "HYDRA build details:\n    Version:                                 5.0.2\n",
            "MPICH",
            "5.0.2",
        ),
        ("MPICH Version:      4.3.0\nMPICH Release date: ...", "MPICH", "4.3.0"),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to ...", "Open MPI", "5.0.11"),
        ("Open MPI v4.1.6, package: Debian OpenMPI, ident: 4.1.6", "Open MPI", "4.1.6"),
        ("prterun (PRRTE) 3.0.11", "Open MPI", "3.0.11"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.10 Build", "Intel MPI", "2021.10"),
        ("MVAPICH Version: 3.0\nbuilt on MPICH 4", "MVAPICH", "3.0"),
        ("something else", None, "of unknown version"),
    ],
)
def test_versions_are_recognised(text: str, family: str | None, version: str) -> None:
    assert (mpi_family(text), doctor.version_in(text)) == (family, version)


def test_two_ranks_that_know_each_other_are_the_proof() -> None:
    assert judge_launch("MPICH", "MPICH", 0, "size 2\nsize 2\n").mark == "ok"
    alone = judge_launch("MPICH", "Open MPI", 0, "size 1\nsize 1\n")
    assert (
        alone.mark == "problem"
        and "2 runs of one rank" in alone.found
        and "MPICH" in alone.found
        and alone.remedy
    )
    failed = judge_launch("MPICH", "MPICH", 1, "error: no route\n\n")
    assert (
        failed.mark == "problem" and "status 1: error: no route" in failed.found and failed.remedy
    )
    slots = judge_launch("Open MPI", "Open MPI", 1, "There are not enough slots available")
    assert slots.mark == "problem" and "oversubscribe" in slots.remedy
    assert judge_launch("MPICH", "MPICH", 1, "size 2\nsize 2\n").mark == "problem"


def test_a_foreign_mpirun_is_found_by_starting_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mpi4py")
    script(
        tmp_path,
        "mpirun",
        'if [ "$1" = --version ]; then echo "mpirun (Open MPI) 5.0.1"; exit; fi\nshift '
        '2\n"$@"\n"$@"\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    findings = list(doctor.check_mpi())
    assert "Open MPI 5.0.1" in named(iter(findings), "mpirun").found
    together = named(iter(findings), "together")
    assert together.mark == "problem" and "2 runs of one rank" in together.found


OPEN_MPI = (0, "mpirun (Open MPI) 5.0.1\nsize 2\nsize 2")


def test_the_variable_of_a_launcher_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, _ in LAUNCHERS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, "run", lambda command: OPEN_MPI)
    monkeypatch.setattr(doctor, "run_python", lambda script: OPEN_MPI)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/mpirun")
    assert not [f for f in doctor.check_mpi() if f.subject == "launcher"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    finding = named(doctor.check_mpi(), "launcher")
    assert finding.mark == "warning" and "unset SLURM_STEP_NUM_TASKS" in finding.remedy


def test_the_grace_of_open_mpi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda command: OPEN_MPI)
    monkeypatch.setattr(doctor, "run_python", lambda script: OPEN_MPI)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/mpirun")
    finding = named(doctor.check_mpi(), "Ctrl-C")
    assert finding.mark == "warning" and "pkill -USR1 prterun" in finding.remedy


def test_mpich_ends_a_run_with_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    mpich = (0, "HYDRA build details:\n    Version: 5.0.2\nsize 2\nsize 2")
    monkeypatch.setattr(doctor, "run", lambda command: mpich)
    monkeypatch.setattr(doctor, "run_python", lambda script: mpich)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/mpirun")
    finding = named(doctor.check_mpi(), "hang-up")
    assert finding.mark == "warning" and "nohup mpirun" in finding.remedy
    assert not [f for f in doctor.check_mpi() if f.subject == "Ctrl-C"]


def test_missing_mpirun_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = named(doctor.check_mpi(), "mpirun")
    assert finding.mark == "problem" and (
        "PATH" in finding.remedy or "pip install" in finding.remedy
    )


def test_library_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Traceback\nRuntimeError: cannot load MPI library\n"
    monkeypatch.setattr(doctor, "run_python", lambda script: (1, text))
    finding = named(doctor.check_mpi(), "libmpi")
    assert (
        finding.mark == "problem"
        and "cannot load MPI library" in finding.found
        and finding.remedy == doctor.INSTALL
    )


def test_both_wheels_at_once_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "run", lambda command: (1, ""))
    finding = named(doctor.check_mpi(), "MPI wheels")
    assert finding.mark == "problem" and "pip uninstall" in finding.remedy


def test_missing_and_old_packages_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"numpy": "1.20.3", "tqdm": None}
    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda name: ["numpy>=1.26", "tqdm>=4.66", "tyro>=0.9", 'pooch>=1.8; extra == "data"'],
    )
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, "9.0"))
    finding = named(doctor.check_packages(), "packages")
    assert finding.mark == "problem"
    assert finding.remedy == "pip install 'numpy>=1.26' 'tqdm>=4.66'"


def test_requirements_are_read() -> None:
    assert parse_requirement("numpy>=1.26") == ("numpy", "1.26", "")
    assert parse_requirement('cupy-cuda12x[ctk]>=14; extra == "cuda12"') == (
        "cupy-cuda12x",
        "14",
        "cuda12",
    )
    assert parse_requirement("mpich; extra == 'mpich'") == ("mpich", "", "mpich")
    assert (
        new_enough("1.26.4", "1.26")
        and new_enough("10.0", "9.1")
        and new_enough("2.0rc1", "2.0")
        and new_enough("5", "")
    )
    assert not new_enough("1.9", "1.26") and not new_enough(None, "")


def test_kernels_are_counted_by_what_runs_them() -> None:
    from minillm import kernels

    (finding,) = (f for f in doctor.check_kernels() if f.subject == "kernels")
    assert (
        finding.mark == "ok"
        and f"of {len(kernels.ops())} operations" in finding.found
        and "numpy:blocked for" in finding.found
    )


def test_cuda_kernels_are_counted_and_it_says_where_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minillm.kernels.gpu import registering

    monkeypatch.setattr(registering, "unavailable", "no GPU: x")
    monkeypatch.setattr(registering, "emulator_unavailable", None)
    (finding,) = (f for f in doctor.check_kernels() if f.subject == "CUDA kernels")
    assert (
        finding.mark == "ok"
        and "operations: cannot run on a GPU (no GPU: x); can run in the emulator" in finding.found
    )
    assert int(finding.found.split()[1]) >= 28
    monkeypatch.setattr(registering, "unavailable", None)
    assert any("operations: run on CuPy arrays" in f.found for f in doctor.check_kernels())


def test_missing_c_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from minillm.kernels import native

    from minillm import kernels

    monkeypatch.setattr(native, "unavailable", "the C extension was not built")
    found = list(doctor.check_kernels())[-1]
    assert found.mark == "warning" and "was not built" in found.found and "gcc" in found.remedy
    monkeypatch.setattr(native, "unavailable", None)
    monkeypatch.setattr(native, "blas_unavailable", "no library")
    with kernels.use(matmul="c:baseline"):
        assert "scipy-openblas64" in list(doctor.check_kernels())[-1].remedy


def test_a_check_that_breaks_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("ok", "first", "fine")
        raise ValueError("planted")

    monkeypatch.setattr(doctor, "check_mpi", broken)
    findings = list(doctor.examine())
    assert named(iter(findings), "doctor").found == "ValueError: planted"
    assert {"Python", "first", "GPU", "cores"} <= {finding.subject for finding in findings}


def test_report_shows_marks_remedies_and_a_verdict() -> None:
    good = Finding("ok", "Python", "3.11")
    bad = Finding("problem", "mpirun", "not found", "pip install it")
    text = report([good, bad])
    assert (
        "ok       Python  3.11" in text
        and "problem  mpirun  not found" in text
        and "-> pip install it" in text
    )
    assert text.splitlines()[-1].startswith("1 problem:")
    assert report([good, Finding("warning", "CuPy", "idle")]).splitlines()[-1] == "train can run."


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda ranks: iter([Finding("warning", "a", "b")]))
    assert doctor.main([]) == 0
    monkeypatch.setattr(
        doctor,
        "examine",
        lambda ranks: iter([Finding("ok", "ranks", str(ranks)), Finding("problem", "a", "b")]),
    )
    assert doctor.main(["--ranks", "7"]) == 1
    assert "ranks  7" in capsys.readouterr().out


def test_it_runs_as_a_program_and_says_where_this_machine_stands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minillm.doctor", "--ranks", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert done.returncode == int(any(line.startswith("problem") for line in lines))
    assert {"Python", "NumPy", "BLAS", "libmpi", "mpirun", "kernels", "GPU", "cores"} <= {
        line[9:].split("  ")[0] for line in lines
    }
    if shutil.which("mpirun"):
        assert any(line.startswith("ok") and "know each other" in line for line in lines), (
            done.stdout
        )


def test_the_trial_start_works_from_inside_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "HYDI_CONTROL_FD"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    status, text = commands.run([sys.executable, "-c", "import os; print(*sorted(os.environ))"])
    assert status == 0
    assert "OMPI_ALLOW_RUN_AS_ROOT" in text.split() and not {
        "PMI_RANK",
        "PMIX_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "HYDI_CONTROL_FD",
    } & set(text.split())


def test_commands_that_hang_or_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "SECONDS", 0.2)
    assert commands.run([sys.executable, "-c", "import time; time.sleep(30)"])[0] == 124
    assert commands.run(["/nowhere/mpirun"])[0] == 127


def test_the_doctor_starts_without_any_package() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'mpi4py', 'tqdm', 'tyro'])); "
        "from minillm import doctor; doctor.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "--clean" in done.stdout, done.stderr
