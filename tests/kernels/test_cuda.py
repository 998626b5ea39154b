"""Building and launching CUDA kernels, as far as that goes without a GPU.

Their results are tested in test_kernels.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_arrays
import ml_dtypes
import numpy as np
import pytest
from minillm.kernels import registry
from minillm.kernels.gpu import build, launching, registering
from minillm.kernels.gpu.grids import rows_in_registers

from minillm import kernels

FILES = build.cuda_files()


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_kernel_compiles_without_spills(path: Path) -> None:
    if build.nvrtc_missing():
        pytest.skip(build.nvrtc_missing() or "")
    arch = next(iter(build.marks(path, "arch")), "sm_80")
    for defines in build.build_sets(path):
        assert not build.complaints(build.report(path, defines, arch)), f"{arch} {defines}"


def test_kernels_for_all_devices_compile_for_hopper() -> None:
    if build.nvrtc_missing():
        pytest.skip(build.nvrtc_missing() or "")
    for path in FILES:
        if not build.marks(path, "arch"):
            assert not build.complaints(build.report(path, build.build_sets(path)[0], "sm_90a")), (
                path
            )


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a kernel that includes a header twice, and set an empty cache."""
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "part.cuh").write_text("#pragma once\n#define TWO 2\n")
    (tmp_path / "more.cuh").write_text('#include "part.cuh"\n#include "elsewhere.h"\n')
    kernel = (
        '// minillm-build: -DWIDE=3 -DON\n#include "part.cuh"\n#include "more.cuh"\n'
        'extern "C" __global__ void two(int* x) { *x = TWO; }\n'
    )
    (tmp_path / "k.cu").write_text(kernel)
    return tmp_path


def test_includes_are_part_of_the_source(sources: Path) -> None:
    text = build.inlined_source(sources / "k.cu")
    assert text.count("#define TWO") == 1 and "pragma" not in text
    assert '#include "elsewhere.h"' in text, "what is not beside the file is the compiler's"
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "void two" in line)
    marks = [(i, line) for i, line in enumerate(lines[:at]) if line.startswith("#line")]
    number, name = marks[-1][1].split()[1:]
    assert name.endswith('k.cu"') and int(number) + at - marks[-1][0] - 1 == 4, (
        "messages name the line of the file"
    )


def test_a_file_says_how_it_is_built(sources: Path) -> None:
    assert build.build_sets(sources / "k.cu") == [{"WIDE": "3", "ON": "1"}]
    assert build.build_sets(sources / "part.cuh") == [{}]
    assert build.architecture(sources / "k.cu", "80") == "sm_80"
    (sources / "h.cu").write_text("// minillm-arch: sm_90a\n")
    assert build.architecture(sources / "h.cu", "90") == "sm_90a"
    with pytest.raises(kernels.KernelUnavailable, match="is for sm_90a, and this device is sm_80"):
        build.architecture(sources / "h.cu", "80")


def test_the_cache_is_made_once_and_whole(sources: Path) -> None:
    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        path.write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: build.cached(".x", ("a", "b"), make), range(16)))
    assert len(paths) == 1 and paths.pop().read_text() == "whole"
    before = len(calls)
    build.cached(".x", ("a", "b"), make)
    assert len(calls) == before and build.cached(".x", ("ab", ""), make) != build.cached(
        ".x", ("a", "b"), make
    )

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        build.cached(".x", ("c",), fail)
    assert sorted({f.read_text() for f in build.cache_folder().iterdir()}) == ["whole"], (
        "a failed build leaves nothing"
    )


def test_what_decides_the_binary_is_in_the_key(sources: Path) -> None:
    if build.nvrtc_missing():
        pytest.skip(build.nvrtc_missing() or "")
    (sources / "more.cuh").write_text('#include "part.cuh"\n')
    first = build.compile_cuda(sources / "k.cu", {}, "sm_80")
    made = len(list(build.cache_folder().iterdir()))
    assert build.compile_cuda(sources / "k.cu", {}, "sm_80") == first
    assert len(list(build.cache_folder().iterdir())) == made
    (sources / "part.cuh").write_text("#pragma once\n#define TWO 3\n")
    assert build.compile_cuda(sources / "k.cu", {}, "sm_80") != first
    build.compile_cuda(sources / "k.cu", {}, "sm_90a")
    build.compile_cuda(sources / "k.cu", {"X": 1}, "sm_90a")
    assert len(list(build.cache_folder().iterdir())) == made + 3


def test_a_compiler_error_names_the_file_and_the_line(sources: Path) -> None:
    if build.nvrtc_missing():
        pytest.skip(build.nvrtc_missing() or "")
    (sources / "more.cuh").write_text("\nint wrong = ;\n")
    with pytest.raises(build.BuildError, match=r"more\.cuh\(2\): error"):
        build.compile_cuda(sources / "k.cu", {}, "sm_80")


def test_the_newest_release_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cu13", "cu100", "cuda_nvrtc", "cuda_runtime", "cu14"]
    for name in names:
        (tmp_path / name).mkdir()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert [folder.name for folder in build.nvidia_folders()] == [
        "cu100",
        "cu14",
        "cu13",
        "cuda_nvrtc",
        "cuda_runtime",
    ]


def test_complaints_are_found() -> None:
    good = (
        "ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info : Used 40 registers"
    )
    assert build.complaints(good) == []
    assert build.complaints(
        "ptxas . 8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads"
    )
    assert build.complaints(
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized"
    )


def test_arguments_are_what_the_kernel_declares() -> None:
    assert (
        launching._argument(None) == np.uint64(0)
        and launching._argument(np.int32(3)).dtype == np.int32
    )
    struct = np.zeros((), [("a", np.int64), ("b", np.float32)])[()]
    passed = launching._argument(struct)
    assert passed.shape == (1,) and passed.tobytes() == struct.tobytes()
    for number in (1, 1.0, True):
        with pytest.raises(TypeError, match="wrap"):
            launching._argument(number)


def test_the_limit_of_shared_memory_only_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a small launch does not lower the limit for the next large one.

    The limit belongs to the kernel.
    """
    limits: list[int] = []
    driver = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        funcSetAttribute=lambda function, attribute, value: limits.append(value),
    )
    cuda_module = SimpleNamespace(driver=driver, runtime=SimpleNamespace(getDevice=lambda: 0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda_module))
    function = SimpleNamespace(ptr=1, max_threads_per_block=256, num_regs=168)
    monkeypatch.setattr(
        launching, "_module", lambda *key: SimpleNamespace(get_function=lambda name: function)
    )
    monkeypatch.setattr(launching, "_functions", {})
    for shared_bytes in (0, 40 << 10, 100 << 10, 60 << 10, 100 << 10, 200 << 10):
        assert launching._function(tmp_path / "k.cu", "k", {}, shared_bytes, 256) is function
    assert limits == [100 << 10, 200 << 10]
    with pytest.raises(ValueError, match=r"blocks of 257 threads; .* can have 256 threads"):
        launching._function(tmp_path / "k.cu", "k", {}, 0, 257)
    function.max_threads_per_block, function.num_regs = 1024, 168  # 65536 / 168 = 390
    launching._functions.clear()
    with pytest.raises(ValueError, match=r"168 registers a thread and can have 390 threads"):
        launching._function(tmp_path / "k.cu", "k", {}, 0, 512)


def test_rows_fit_their_registers() -> None:
    for D in (1, 33, 256, 257, 768, 1000, 1024, 1025, 4096, 8192):
        for most in (16, 32):
            if 256 * most < D:
                continue
            layout = rows_in_registers(D, most)
            assert layout.values % 8 == 0 and layout.values <= most
            assert layout.threads * layout.values >= D and layout.threads * layout.rows <= 256
    with pytest.raises(ValueError, match="up to 8192 elements, and this one 8193"):
        rows_in_registers(8193)


def test_the_emulator_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones(4, np.float32)
    for op in kernels.ops():
        assert kernels.chosen(op, x).backend != "emulator"
    monkeypatch.setattr(
        registry,
        "_kernels",
        {"add": [k for k in kernels.available("add") if k.backend == "emulator"]},
    )
    with pytest.raises(kernels.KernelUnavailable):
        registry._find("add", type(x), x.dtype, "")


def test_without_a_gpu_the_reason_is_named() -> None:
    if registering.unavailable is None:
        pytest.skip("this machine has a GPU")
    with (
        pytest.raises(
            kernels.KernelUnavailable, match=r"CuPy is not installed|no NVIDIA device|NVRTC"
        ),
        kernels.use(add="cuda:v1"),
    ):
        pass


def _needs_emulator() -> None:
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)


def test_random_normals_have_the_bits_of_numpy() -> None:
    _needs_emulator()
    indices = np.r_[np.arange(3000), np.random.default_rng(0).integers(0, 2**63, 3000)].astype(
        np.uint64
    )
    with kernels.use(random_normal="emulator"):
        found = kernels.random_normal(2**64 - 5, indices)
    with kernels.use(random_normal="numpy"):
        assert found.tobytes() == kernels.random_normal(2**64 - 5, indices).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dropout_has_the_bits_of_numpy(dtype: Any) -> None:
    _needs_emulator()
    x = np.random.default_rng(0).standard_normal((3, 11, 70)).astype(dtype)
    address = (2**63 + 11, np.array([5, 0, 2**31]), np.arange(11) * 1000, np.arange(70) + 9)
    with kernels.use(dropout_forward="emulator"):
        found = kernels.dropout_forward(x, 0.5, *address)
    with kernels.use(dropout="numpy"):
        assert np.array_equal(found, kernels.dropout_forward(x, 0.5, *address))


def test_an_array_of_another_dtype_is_refused() -> None:
    _needs_emulator()
    x = np.ones((2, 8), np.float32)
    with (
        kernels.use(layernorm="emulator"),
        pytest.raises(TypeError, match="one dtype, not float32, float64"),
    ):
        kernels.layernorm_forward(x, np.ones(8), None, 1e-5)


def test_more_arrays_are_added_than_one_launch_takes() -> None:
    _needs_emulator()
    parts = [np.full(33, i + 1, np.float32) for i in range(19)]
    with kernels.use(grad_norm="emulator"):
        squares = kernels.sum_arrays(parts[12], parts)
    assert np.array_equal(parts[12], np.full(33, 190)) and float(squares) == 33 * 190**2


class HostDevice:
    """Device whose memory is the host's: shows that the cases travel and come back unchanged."""

    module = np

    def __init__(self) -> None:
        self.own: list[Any] = []

    def upload(self, data: np.ndarray) -> np.ndarray:
        self.own.append(data.copy())
        return self.own[-1]

    def download(self, data: np.ndarray) -> np.ndarray:
        return data.copy()

    def view(self, data: np.ndarray, offset: int, like: np.ndarray) -> np.ndarray:
        return np.ndarray(like.shape, like.dtype, data, offset, like.strides)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x.copy()

    def owns(self, x: Any) -> bool:
        return isinstance(x, np.ndarray)


def test_numpy_arrays_travel_to_a_device_and_back() -> None:
    holder, other = np.arange(24.0).reshape(4, 6), np.asfortranarray(np.ones((4, 2)))
    seen = []

    def binding(x: Any, parts: tuple[Any, ...], *, out: Any) -> tuple[Any, Any, None]:
        seen.append(
            (x.strides, np.shares_memory(x, out), np.shares_memory(x, holder), parts[0].strides)
        )
        out[...] = x + parts[0]
        return out, x * 2, None

    out = holder[:, 4:]
    result, doubled, nothing = device_arrays.on_device(binding, HostDevice())(
        holder[:, :2], (other,), out=out
    )
    assert seen == [((48, 8), False, False, other.strides)]
    assert result is out and nothing is None
    assert np.array_equal(out, holder[:, :2] + 1) and np.array_equal(doubled, 2 * holder[:, :2])
    assert np.array_equal(holder[:, 2:4], np.arange(24.0).reshape(4, 6)[:, 2:4])


def test_building_all_kernels_is_a_program(tmp_path: Path) -> None:
    if build.nvrtc_missing():
        pytest.skip(build.nvrtc_missing() or "")
    command = [
        sys.executable,
        "-m",
        "minillm.kernels.gpu.precompile",
        "--capability",
        "90",
        "--processes",
        "1",
        "--only",
        "residual/",
    ]
    done = subprocess.run(
        command, env={**os.environ, "MINILLM_CACHE": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("residual/v1.cu") == 3 and len(list(tmp_path.iterdir())) == 3
