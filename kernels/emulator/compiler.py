"""From a `.cu` file to a shared library of the host: the kernels, compiled with a call before every
memory access, and the emulator's own C++ linked to them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from minillm.kernels.gpu.build import FOLDER, BuildError, Defines, cached, inlined_source

HERE = Path(__file__).resolve().parent
ROOT = FOLDER.parent
_CANDIDATES = (*filter(None, [os.environ.get("CXX")]), "g++", "clang++")
HEADERS = ("cuda.h", "ampere.h", "hopper.h")  # put before a .cu file
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    f"-ffile-prefix-map={ROOT}=.",
)
_RUNTIME = (*_COMMON, "-O2")  # without lines: reports name those of the kernel
# Loads and stores are to stay as they are written: no vectorising, no merging. What a GPU has not
# initialised holds a pattern, not zero.
_KERNEL = (
    *(
        *_COMMON,
        "-O1",
        "-gdwarf-4",
        "-g1",
        "-w",
        "-DMINILLM_EMULATOR",
        "-fsanitize=thread",
        "-ffp-contract=off",
    ),
    *("-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-optimize-sibling-calls"),
)
_GCC_ONLY = (
    "-fsanitize=bounds",
    "-fno-tree-sra",
    "-fno-store-merging",
    "--param=tsan-distinguish-volatile=0",
)
_CLANG_ONLY = ("-fsanitize=array-bounds",)


class Compiler(NamedTuple):
    path: str
    version: str  # its first line about itself, part of every key

    @property
    def is_gcc(self) -> bool:
        return "clang" not in self.version


@functools.cache
def host_compiler() -> Compiler | None:
    """$CXX, g++ or clang++; None if there is none of them."""
    for name in _CANDIDATES:
        path = shutil.which(name)
        if path is not None:
            lines = subprocess.run(
                [path, "--version"], capture_output=True, text=True, check=False
            ).stdout.splitlines()
            return Compiler(path, lines[0] if lines else path)
    return None


def compiler_missing() -> str | None:
    """Why nothing can be emulated here; None if it can. Looks for a file only."""
    return (
        None
        if any(map(shutil.which, _CANDIDATES))
        else "no host C++ compiler (install g++ or clang++)"
    )


def _run(command: list[str], text: str | None, what: str) -> None:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise BuildError(f"{what} does not compile for the emulator:\n{done.stderr}")


def _compile_object(compiler: Compiler, source: Path, target: Path) -> None:
    _run([compiler.path, *_RUNTIME, "-c", str(source), "-o", str(target)], None, source.name)


def _objects(compiler: Compiler) -> list[Path]:
    """The emulator's own files, compiled, on all cores."""
    headers = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.h"))]

    def compiled(source: Path) -> Path:
        key = (
            source.name,
            source.read_text(encoding="utf-8"),
            *headers,
            *_RUNTIME,
            compiler.version,
        )
        return cached(".o", key, functools.partial(_compile_object, compiler, source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sorted(HERE.glob("*.cpp"))))


class Parameter(NamedTuple):
    name: str
    declaration: str


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", lambda found: " " * len(found[0]), text, flags=re.DOTALL)


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise BuildError("a parenthesis is never closed")


def kernels_in(text: str) -> dict[str, list[Parameter]]:
    """The kernels that a source defines, with their parameters."""
    text = _without_comments(text)
    found = {}
    for mark in re.finditer(r"\b__global__\b", text):
        position = mark.end()
        while match := re.compile(r"\s*(\w+)").match(text, position):
            position = match.end()
            if text[position : position + 1] != "(":
                continue
            end = _closing(text, position)
            if match[1] != "__launch_bounds__":
                found[match[1]] = list(_parameters(text[position + 1 : end - 1]))
                break
            position = end
    return found


def _parameters(text: str) -> Iterator[Parameter]:
    for part in re.split(r",(?![^<(]*[>)])", text):
        words = re.findall(r"\w+", part)
        if words:
            yield Parameter(words[-1], " ".join(part.split()))


# One function per kernel that calls it with arguments from an array of pointers, and one that says
# of what kinds they are.
_ENTRIES = """
namespace emulator_entries {
template <char LETTER, int BYTES> struct Is {
    static constexpr char letter = LETTER;
    static constexpr int bytes = BYTES;
};
template <typename P> struct Kind : Is<(P)0.5f != (P)0 ? 'f' : 'i', sizeof(P)> {};
template <typename P> struct Kind<P*> : Is<'p', sizeof(P)> {};
template <> struct Kind<void*> : Is<'p', 0> {};
template <> struct Kind<const void*> : Is<'p', 0> {};
template <typename P, bool IS_CLASS> struct Described : Kind<P> {};
template <typename P> struct Described<P, true> : Is<'s', sizeof(P)> {};
template <typename P> struct Bare { typedef P type; };
template <typename P> struct Bare<const P> { typedef P type; };
template <int... I> struct Numbers {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Numbers<I...> type; };
template <typename... P, int... I> void call(void (*kernel)(P...), void** args, Numbers<I...>) {
    kernel(*static_cast<typename Bare<P>::type*>(args[I])...);
}
template <typename... P> void call(void (*kernel)(P...), void** args) {
    call(kernel, args, typename Count<sizeof...(P)>::type());
}
template <typename... P> int describe(void (*)(P...), char* letters, int* bytes) {
    const char all_letters[] = {Described<typename Bare<P>::type, __is_class(P)>::letter..., 0};
    const int all_bytes[] = {Described<typename Bare<P>::type, __is_class(P)>::bytes..., 0};
    for (unsigned i = 0; i < sizeof...(P); i++) {
        letters[i] = all_letters[i];
        bytes[i] = all_bytes[i];
    }
    return sizeof...(P);
}
}
"""


def _entry(name: str) -> str:
    visible = 'extern "C" __attribute__((visibility("default"), no_sanitize("thread")))'
    return (
        f"{visible} void emulator_call_{name}(void** args) {{ emulator_entries::call({name}, "
        f"args); }}\n"
        f"{visible} int emulator_describe_{name}(char* letters, int* bytes)\n"
        f"{{ return emulator_entries::describe({name}, letters, bytes); }}\n"
    )


class Compiled(NamedTuple):
    """A library and what its kernels take."""

    library: Path
    kernels: dict[str, list[Parameter]]


_wanted: dict[
    Any, threading.Lock
] = {}  # what has been asked for: threads that want the same wait for the first


def compile_host(
    path: Path, defines: tuple[tuple[str, str | int], ...], edits: tuple[tuple[str, str], ...] = ()
) -> Compiled:
    """The library of a `.cu` file compiled with macros, from the cache where it has been compiled
    before; `edits` (old text, new text) are made to its source, includes in their places, first.
    Raises BuildError."""
    with _wanted.setdefault((path, defines, edits), threading.Lock()):
        return _compile_host(path, defines, edits)


@functools.cache
def _compile_host(
    path: Path, defines: tuple[tuple[str, str | int], ...], edits: tuple[tuple[str, str], ...]
) -> Compiled:
    text = inlined_source(path)
    for old, new in edits:
        text = text.replace(old, new)
    return compile_text(path, text, dict(defines))


def compile_text(path: Path, text: str, defines: Defines) -> Compiled:
    """The same for a text that stands for the file `path`. Raises BuildError if it does not
    compile."""
    compiler = host_compiler()
    if compiler is None:
        raise BuildError(compiler_missing() or "no host C++ compiler")
    kernels = kernels_in(text)
    source = (
        text + '\n#line 1 "kernels/emulator/entries"\n' + _ENTRIES + "".join(map(_entry, kernels))
    )
    objects = _objects(compiler)
    options = [
        *_KERNEL,
        *_initialisation(compiler),
        *(_GCC_ONLY if compiler.is_gcc else _CLANG_ONLY),
    ]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    for header in HEADERS:
        options += ["-include", str(HERE / header)]

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kernel = Path(folder) / "kernel.o"
            _run(
                [compiler.path, *options, "-x", "c++", "-c", "-", "-o", str(kernel)],
                source,
                path.name,
            )
            link = [
                compiler.path,
                "-shared",
                "-Wl,-Bsymbolic",
                str(kernel),
                *map(str, objects),
                "-o",
                str(target),
                "-lm",
            ]
            _run(link, None, path.name)

    key = (source, *options, *(path.name for path in objects), compiler.version)
    return Compiled(cached(".so", key, make), kernels)


def _initialisation(compiler: Compiler) -> tuple[str, ...]:
    """The option that fills uninitialised local variables with a pattern, where the compiler has it
    (gcc from 12 on)."""
    number = re.search(r"(\d+)\.\d+", compiler.version)
    new_enough = not compiler.is_gcc or (number is not None and int(number[1]) >= 12)
    return ("-ftrivial-auto-var-init=pattern",) if new_enough else ()
