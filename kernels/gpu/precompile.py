"""Compile every CUDA kernel into the cache, side by side, before many processes need it.

Run as `python -m minillm.kernels.gpu.precompile`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

from minillm.kernels.gpu import build
from minillm.kernels.registry import KernelUnavailable


def main(argv: Sequence[str] | None = None) -> int:
    """Compile every file with every set of macros that it names, for one device.

    Returns 1 if one does not compile.
    """
    parser = argparse.ArgumentParser(
        prog="minillm.kernels.gpu.precompile",
        description="Compile every CUDA kernel into the cache.",
    )
    parser.add_argument(
        "--capability",
        default="90",
        help="compute capability of the device, such as 80 or 90 (default: 90)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="compilers side by side (default: one for each core)",
    )
    parser.add_argument("--only", default="", help="only files whose folder/name holds this")
    parser.add_argument("--seconds", type=float, help="start no compiler after this time")
    args = parser.parse_args(argv)
    files = [path for path in build.cuda_files() if args.only in f"{path.parent.name}/{path.name}"]
    work = [
        (path, defines, args.capability) for path in files for defines in build.build_sets(path)
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        futures = [pool.submit(compile_one, each) for each in work]
        late = wait(futures, timeout=args.seconds).not_done
        unstarted = {future for future in late if future.cancel()}
        results = [
            "FAILED: not run, no time" if future in unstarted else future.result()
            for future in futures
        ]
    for (path, defines, _), result in zip(work, results, strict=True):
        print(
            f"{path.parent.name}/{path.name} {' '.join(f'-D{k}={v}' for k, v in defines.items())}: "
            f"{result}"
        )
    return int(any(result.startswith("FAILED") for result in results))


def compile_one(work: tuple[Path, build.Defines, str]) -> str:
    """Compile a file with one set of macros for one capability, and describe the outcome.

    It begins with ok, left out or FAILED.
    """
    path, defines, capability = work
    try:
        cubin = build.compile_cuda(path, defines, build.architecture(path, capability))
        return f"ok, {len(cubin)} bytes"
    except KernelUnavailable as reason:
        return f"left out: {reason}"
    except build.BuildError as error:
        return f"FAILED: {error}"


if __name__ == "__main__":
    sys.exit(main())
