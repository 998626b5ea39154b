"""Compilation of `.cu` files to cubins, with a cache on disk.

NVRTC comes from the pip wheels. Neither a CUDA toolkit nor a GPU is needed.

    cubin = compile_cuda(folder / "v1.cu", {"ELEMENT": "bfloat16"}, "sm_90a")

Comments in a file may set how it is built:

    // minillm-arch: sm_90a                          the only architecture with its instructions
    // minillm-options: --fmad=false                 options that its results depend on
    // minillm-build: -DELEMENT=bfloat16             one set of macros to check, one line a set
    // minillm-sass: gelu_* STG.E.128 LDG.E.128*2 instructions that the machine code of each kernel
                                                  of such a name holds, with the least count

`python -m minillm.kernels.gpu.precompile` compiles all of them for one device, with one process
per core.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minillm.kernels.registry import KernelUnavailable

Defines = Mapping[str, str | int]

FOLDER = Path(__file__).resolve().parent.parent  # of all kernels
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_ONCE = re.compile(r"^\s*#\s*pragma\s+once\s*$")


class BuildError(Exception):
    """Failed compilation of a kernel, with the compiler's log, or a missing compiler."""


def inlined_source(path: Path) -> str:
    """Return the text of a file with its quoted includes inlined, each once.

    `#line` marks make compiler messages name the real files. Includes that are not found beside the
    file are the compiler's own headers and stay. The result alone determines the compilation, so it
    is the cache key.
    """
    return "\n".join(_inlined(path.resolve(), set())) + "\n"


def _inlined(path: Path, seen: set[Path]) -> Iterable[str]:
    seen.add(path)
    shown = (
        path.relative_to(FOLDER.parent).as_posix()
        if path.is_relative_to(FOLDER.parent)
        else path.as_posix()
    )
    yield f'#line 1 "{shown}"'
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        file = (path.parent / include[1]).resolve() if include else None
        if file is None or not file.is_file():
            yield "" if _ONCE.match(line) else line
            continue
        if file not in seen:
            yield from _inlined(file, seen)
        yield f'#line {number + 1} "{shown}"'


def marks(path: Path, name: str) -> list[str]:
    """Return the values of the lines `// minillm-<name>: ...` of a file."""
    return [
        found.strip()
        for found in re.findall(
            rf"^//\s*minillm-{name}:(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]


def build_sets(path: Path) -> list[dict[str, str]]:
    """Return the sets of macros with which a file is checked; one empty set if it names none."""
    lines = marks(path, "build") or [""]
    return [
        {
            name: value or "1"
            for name, _, value in (word.removeprefix("-D").partition("=") for word in line.split())
        }
        for line in lines
    ]


def architecture(path: Path, capability: str) -> str:
    """Return the architecture of a file for a compute capability such as "90".

    Raises KernelUnavailable if the file is for another one.
    """
    wanted = next(iter(marks(path, "arch")), None)
    if wanted is None:
        return f"sm_{capability}"
    if wanted.rstrip("a") != f"sm_{capability}":
        raise KernelUnavailable(
            f"{path.parent.name}/{path.name} is for {wanted}, and this device is sm_{capability}"
        )
    return wanted


# ---- the cache


def cache_folder() -> Path:
    """Return the folder of compiled kernels: $MINILLM_CACHE, or ~/.cache/minillm."""
    chosen = os.environ.get("MINILLM_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm"
    )


def cached(suffix: str, key: Iterable[str], make: Callable[[Path], object]) -> Path:
    """Return the file that `make(path)` writes, made at the first call with this key.

    Concurrent processes are safe: each writes a file of its own and renames it.
    """
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:40]
    path = cache_folder() / f"{digest}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix, f"{digest}.", path.parent)
        os.close(handle)
        try:
            make(Path(name))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    return path


# ---- NVRTC


class _Nvrtc(NamedTuple):
    library: ctypes.CDLL
    version: str
    include: tuple[str, ...]


def nvidia_folders() -> list[Path]:
    """Return the folders of NVIDIA's pip wheels, newest first.

    From CUDA 13 on there is one for each release (nvidia/cu13), before that one for each part
    (nvidia/cuda_nvrtc).
    """
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    folders = [folder for root in roots for folder in Path(root).iterdir() if folder.is_dir()]

    def release(folder: Path) -> int:
        found = re.fullmatch(r"cu(\d+)", folder.name)
        return int(found[1]) if found else 0

    return sorted(folders, key=lambda folder: (-release(folder), folder.name))


def toolkit_folders() -> list[Path]:
    """CUDA toolkits installed in the usual places."""
    places = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return [Path(place) for place in places if place and Path(place).is_dir()]


def _library_files() -> list[Path]:
    wheels = [
        file for folder in nvidia_folders() for file in sorted(folder.glob("lib/libnvrtc.so.*"))
    ]
    return wheels + [
        file
        for folder in toolkit_folders()
        for file in sorted(folder.glob("lib64/libnvrtc.so.*[0-9]"))[:1]
    ]


@functools.cache
def _nvrtc() -> _Nvrtc:
    files = [file for file in _library_files() if ".alt." not in file.name]
    if not files:
        raise BuildError(
            "NVRTC, the compiler of CUDA kernels, is not installed: pip install 'cupy-cuda13x[ctk]'"
        )
    for builtins in sorted(files[0].parent.glob("libnvrtc-builtins.so.*")):
        if ".alt." not in builtins.name:  # NVRTC looks for it by name, outside its own folder
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(files[0]))
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    include = [
        str(f / "include")
        for f in nvidia_folders() + toolkit_folders()
        if (f / "include" / "cuda_bf16.h").is_file()
    ]
    return _Nvrtc(library, f"{major.value}.{minor.value}", tuple(include[:1]))


def nvrtc_missing() -> str | None:
    """Return why no GPU code can be compiled here, or None.

    Checks for files only and loads no library.
    """
    return None if _library_files() else "NVRTC is not installed (pip install 'cupy-cuda13x[ctk]')"


def nvrtc_version() -> str:
    """Return the version, such as "13.0". Raises BuildError if NVRTC is missing."""
    return _nvrtc().version


def compile_text(text: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile a source text and return its cubin and the compiler's log.

    Raises BuildError with the log if it does not compile.
    """
    lib = _nvrtc().library
    program = ctypes.c_void_p()
    _check(
        lib,
        lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None),
    )
    try:
        words = [option.encode() for option in options]
        status = lib.nvrtcCompileProgram(
            program, len(words), (ctypes.c_char_p * len(words))(*words)
        )
        log = _fetch(lib, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise BuildError(f"{name} does not compile with {' '.join(options)}:\n{log}")
        return _fetch(lib, program, "CUBIN"), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(lib, getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(lib, getattr(lib, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(lib: ctypes.CDLL, status: int) -> None:
    if status:
        raise BuildError(f"NVRTC: {lib.nvrtcGetErrorString(status).decode()}")


def options_for(path: Path, defines: Defines, arch: str) -> list[str]:
    """Return the compiler's options, which with the source determine the cubin."""
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    own = [word for line in marks(path, "options") for word in line.split()]
    return [f"-arch={arch}", "-std=c++17", "-lineinfo", *own, *macros]


def compile_cuda(path: Path, defines: Defines, arch: str) -> bytes:
    """Return the cubin of a `.cu` file, cached on disk.

    Raises BuildError if it does not compile.
    """
    text, options = inlined_source(path), options_for(path, defines, arch)
    nvrtc = _nvrtc()

    def make(target: Path) -> None:
        cubin, _ = compile_text(
            text, path.name, [*options, *(f"-I{folder}" for folder in nvrtc.include)]
        )
        target.write_bytes(cubin)

    return cached(".cubin", (text, *options, f"nvrtc {nvrtc.version}"), make).read_bytes()


def report(path: Path, defines: Defines, arch: str) -> str:
    """Compile a file and return the log with registers, spills and warnings of every kernel.

    Does not use the cache. Raises BuildError.
    """
    options = [
        *options_for(path, defines, arch),
        "--ptxas-options=-v",
        *(f"-I{folder}" for folder in _nvrtc().include),
    ]
    return compile_text(inlined_source(path), path.name, options)[1]


def complaints(log: str) -> list[str]:
    """Return the lines of a compiler's log that no kernel may cause.

    They report registers spilled to memory and asynchronous products made synchronous.
    """
    spilled = [
        line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes spill", line)
    ]
    return spilled + [line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]


def cuda_files() -> list[Path]:
    """Return every `.cu` file of the kernels."""
    return sorted(FOLDER.glob("*/*.cu"))
