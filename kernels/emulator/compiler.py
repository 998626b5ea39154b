"""Compilation of `.cu` files to shared libraries of the host.

The compiler inserts a call before every memory access of a kernel. The emulator's own C++ files are
linked to the result.
"""

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
MAX_THREADS = 1024  # of a block of a kernel without __launch_bounds__
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
    """Host C++ compiler."""

    path: str
    version: str  # first line of --version, part of every cache key

    @property
    def is_gcc(self) -> bool:
        return "clang" not in self.version


@functools.cache
def host_compiler() -> Compiler | None:
    """Return the first of $CXX, g++ and clang++ that is installed; None without any."""
    for name in _CANDIDATES:
        path = shutil.which(name)
        if path is not None:
            lines = subprocess.run(
                [path, "--version"], capture_output=True, text=True, check=False
            ).stdout.splitlines()
            return Compiler(path, lines[0] if lines else path)
    return None


def compiler_missing() -> str | None:
    """Return the reason why the emulator cannot run here; None if it can.

    Searches the path for a compiler and starts no process.
    """
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
    """Compile the emulator's own C++ files on all cores and return the object files.

    Unchanged files come from the cache. Raises BuildError if one does not compile.
    """
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
    """Kernel parameter, as declared in the source."""

    name: str
    declaration: str


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", lambda found: " " * len(found[0]), text, flags=re.DOTALL)


def _closing(text: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`.

    Raises BuildError if none does.
    """
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise BuildError("a parenthesis is not closed")


def kernels_in(text: str) -> dict[str, list[Parameter]]:
    """Return the parameters of each kernel that a source defines, by the kernel's name.

    Raises BuildError for unbalanced parentheses after `__global__`.
    """
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


def bounds_in(text: str) -> dict[str, str]:
    """Return the expression of the most threads of a block, by kernel, where a source gives one."""
    text, found = _without_comments(text), {}
    for mark in re.finditer(r"\b__launch_bounds__\s*(?=\()", text):
        end = _closing(text, mark.end())
        if name := re.compile(r"\s*(\w+)").match(text, end):
            found[name[1]] = text[mark.end() + 1 : end - 1].split(",")[0]
    return found


def _parameters(text: str) -> Iterator[Parameter]:
    for part in re.split(r",(?![^<(]*[>)])", text):
        words = re.findall(r"\w+", part)
        if words:
            yield Parameter(words[-1], " ".join(part.split()))


# One function per kernel that calls it with arguments from an array of pointers, one that says of
# what kinds they are, and a constant: the most threads of a block.
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


def _entry(name: str, most_threads: str) -> str:
    visible = 'extern "C" __attribute__((visibility("default"), no_sanitize("thread")))'
    return (
        f"{visible} void emulator_call_{name}(void** args) {{ emulator_entries::call({name}, "
        f"args); }}\n"
        f"{visible} int emulator_describe_{name}(char* letters, int* bytes)\n"
        f"{{ return emulator_entries::describe({name}, letters, bytes); }}\n"
        'extern "C" __attribute__((visibility("default"))) '
        f"const int emulator_most_threads_{name} = {most_threads};\n"
    )


class Compiled(NamedTuple):
    """Compiled library, with the parameters of its kernels by name."""

    library: Path
    kernels: dict[str, list[Parameter]]


# A lock for each library requested: threads that request the same one wait for the first.
_wanted: dict[Any, threading.Lock] = {}


def compile_host(
    path: Path, defines: tuple[tuple[str, str | int], ...], edits: tuple[tuple[str, str], ...] = ()
) -> Compiled:
    """Compile a `.cu` file, or take its library from the cache.

    `defines`: (name, value) of macros. `edits`: (old text, new text) to replace in the source after
    its includes are inlined. Raises BuildError if the source does not compile, or without a
    compiler. Thread-safe.
    """
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
    """Compile the source `text`, or take its library from the cache.

    `path` names the source in messages and is not read. Raises BuildError if the text does not
    compile, or without a compiler.
    """
    compiler = host_compiler()
    if compiler is None:
        raise BuildError(compiler_missing() or "no host C++ compiler")
    kernels, bounds = kernels_in(text), bounds_in(text)
    entries = "".join(_entry(name, bounds.get(name, str(MAX_THREADS))) for name in kernels)
    source = text + '\n#line 1 "kernels/emulator/entries"\n' + _ENTRIES + entries
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
    """Return the option that fills uninitialised local variables with a pattern.

    gcc has it from version 12 on. For older versions the result is empty.
    """
    number = re.search(r"(\d+)\.\d+", compiler.version)
    new_enough = not compiler.is_gcc or (number is not None and int(number[1]) >= 12)
    return ("-ftrivial-auto-var-init=pattern",) if new_enough else ()
