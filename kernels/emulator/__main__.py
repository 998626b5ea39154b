"""Command line of the emulator: run an operation on small inputs and trace one thread.

python -m minillm.kernels.emulator attention v2 --T 128 --block 1 --thread 37 --watch S,m,l
python -m minillm.kernels.emulator layernorm v1 --accesses 20
python -m minillm.kernels.emulator attention v2 --heatmap v2.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from minillm.kernels import registry
from minillm.kernels.emulator import heatmap
from minillm.kernels.emulator.examples import EXAMPLES, Sizes, example, largest_error
from minillm.kernels.emulator.heatmap import own_frame
from minillm.kernels.emulator.machine import ORDERS, Launched, emulate
from minillm.kernels.emulator.report import EmulatorError
from minillm.kernels.emulator.structs import IS_ASYNCHRONOUS, IS_WRITE
from minillm.kernels.gpu.build import FOLDER, BuildError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minillm.kernels.emulator",
        description="Run a kernel on the CPU and watch one thread.",
    )
    parser.add_argument(
        "op",
        help="an operation (attention_backward) or a family, whose first operation runs "
        "(attention)",
    )
    parser.add_argument("variant", nargs="?", help="v1, v2 ... (default: the operation's first)")
    for name, default in vars(Sizes()).items():
        if name != "causal":
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}"
            )
    parser.add_argument("--full", action="store_true", help="attention without a causal mask")
    parser.add_argument(
        "--dtype", help="of the arrays (default: bfloat16 where the kernel takes it)"
    )
    parser.add_argument(
        "--kernel", help="show only this kernel, where the operation launches several"
    )
    parser.add_argument(
        "--block", type=int, default=0, help="number of the block to watch, x fastest (default 0)"
    )
    parser.add_argument(
        "--thread", type=int, default=0, help="number of the thread in it (default 0)"
    )
    parser.add_argument(
        "--watch", help="names to show, with commas (default: all that the kernel marks with WATCH)"
    )
    parser.add_argument(
        "--accesses",
        type=int,
        metavar="N",
        help="list the thread's first N accesses (default: 20 if it shows no values)",
    )
    parser.add_argument(
        "--heatmap",
        type=Path,
        metavar="FILE.svg",
        help="draw bank conflicts and coalescing of the block's accesses",
    )
    parser.add_argument(
        "--edit",
        nargs=2,
        action="append",
        default=[],
        metavar=("OLD", "NEW"),
        help="replace a text of the source first",
    )
    parser.add_argument(
        "--order",
        choices=ORDERS,
        default=ORDERS[0],
        help="which thread runs next (default: round robin)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the inputs, and of the random order"
    )
    return parser


def _chosen(name: str, variant: str | None) -> registry.Kernel:
    """Return the first emulated implementation of an operation or family, forward before backward.

    Raises KernelUnavailable if there is none, or if it cannot run here. The message lists the
    implementations that exist.
    """
    everything = (k for op in registry.ops() for k in registry.available(op))
    entries = [
        k
        for k in everything
        if name in (k.op, k.family) and k.backend == "emulator" and k.op in EXAMPLES
    ]
    entries.sort(key=lambda k: list(EXAMPLES).index(k.op))  # forward before backward
    found = next((k for k in entries if variant in (None, k.variant)), None)
    if found is None or found.unavailable:
        known = sorted({k.family for op in EXAMPLES for k in registry.available(op)})
        there = ", ".join(f"{k.op} {k.variant}" for k in entries) or ", ".join(known)
        unknown = f"the emulator runs {there}, not {name} {variant or ''}"
        raise registry.KernelUnavailable(str(found.unavailable) if found else unknown)
    return found


def _require_texts(texts: list[str]) -> None:
    sources = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*/*.cu*")]
    for text in texts:
        if not any(text in source for source in sources):
            raise BuildError(f"no kernel holds the text {text!r}")


def _dtype(kernel: registry.Kernel, wanted: str | None) -> str:
    if wanted is None:
        return "bfloat16" if "bfloat16" in kernel.dtypes else "float32"
    if kernel.dtypes and wanted not in kernel.dtypes:
        raise registry.KernelUnavailable(
            f"{kernel.op} {kernel.variant} takes {', '.join(kernel.dtypes)}, not {wanted}"
        )
    return wanted


def _numbers(value: np.ndarray) -> str:
    text = np.array2string(
        value, precision=4, suppress_small=True, max_line_width=110, threshold=512
    )
    return text.replace("\n", "\n        ")


def show_thread(launched: Launched, names: set[str] | None, accesses: int | None) -> None:
    """Print the watched thread's WATCH values, then its memory accesses.

    `names`: the values to print, None for all. `accesses`: the number of accesses to print; None
    means 20 if the kernel has no WATCH, and 0 otherwise.
    """
    seen = [w for w in launched.watched if names is None or w.name in names]
    frames = launched.symbols.frames([w.site for w in seen])
    for step, watched in enumerate(seen, 1):
        place = frames[watched.site][0] if frames[watched.site] else "?"
        size = f" {list(watched.value.shape)}" if watched.value.ndim else ""
        print(f"  step {step}, {place}: {watched.name}{size}\n        {_numbers(watched.value)}")
    marked = sorted({w.name for w in launched.watched})
    if not seen and marked:
        print(f"  there is no such value; the thread shows {', '.join(marked)}")
    accesses = (0 if marked else 20) if accesses is None else accesses
    frames = launched.symbols.frames(launched.trace["site"][:accesses])
    for row in launched.trace[:accesses]:
        where = own_frame(frames[int(row["site"])])
        print(f"  {_described(launched, row):<72} {where}: {where.text if where else ''}")
    if 0 < accesses < len(launched.trace):
        print(f"  ... and {len(launched.trace) - accesses} accesses more")


def _described(launched: Launched, row: np.void) -> str:
    """Return a description of one access, a row of dtype TRACED.

    Examples: "reads x[3 .. 6] = 0.5 1.2 -0.1 0.3", "writes byte 128 of dynamic shared memory, 16
    bytes".
    """
    verb, address, size = (
        "writes" if row["flags"] & IS_WRITE else "reads",
        int(row["address"]),
        int(row["bytes"]),
    )
    memory = launched.memory_at(address)
    if memory is None or memory.dtype is None or size % memory.dtype.itemsize:
        place = (
            f"byte {address - memory.address} of {memory.name}" if memory else "memory of no array"
        )
        return f"{verb} {place}, {size} bytes" + (
            " asynchronously" if row["flags"] & IS_ASYNCHRONOUS else ""
        )
    first, count = (
        (address - memory.address) // memory.dtype.itemsize,
        size // memory.dtype.itemsize,
    )
    values = row["data"].tobytes()[:size]
    shown = " ".join(f"{float(v):.4g}" for v in np.frombuffer(values, memory.dtype)[:4])
    index = f"{first}" if count == 1 else f"{first} .. {first + count - 1}"
    return f"{verb} {memory.name}[{index}] = {shown}{' ...' if count > 4 else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 1 after an error, which goes to stderr."""
    args = _parser().parse_args(argv)
    sizes = Sizes(
        T=args.T,
        batch=args.batch,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_width=args.head_width,
        width=args.width,
        causal=not args.full,
    )
    record: list[Launched] = []
    try:
        kernel = _chosen(args.op, args.variant)
        dtype = _dtype(kernel, args.dtype)
        edits = tuple((old, new) for old, new in args.edit)
        _require_texts([old for old, _ in edits])
        watching = {"log_block": args.block, "watch": (args.block, args.thread), "record": record}
        with (
            registry.use(**{kernel.op: kernel.choice}),
            emulate(order=args.order, seed=args.seed, edits=edits, **watching),
        ):
            results = example(kernel.op, sizes, dtype, args.seed)
    except (registry.KernelUnavailable, EmulatorError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{kernel.op} {kernel.variant}, {dtype}, {sizes}")
    with registry.use(**{kernel.op: "numpy"}):
        print(
            "relative error against float64: "
            f"{largest_error(results, example(kernel.op, sizes, dtype, args.seed, wide=True)):.1e}"
        )
    names = set(args.watch.split(",")) if args.watch else None
    shown = [launched for launched in record if args.kernel in (None, launched.kernel)]
    for launched in shown:
        picture = args.heatmap and (
            args.heatmap
            if len(shown) == 1
            else args.heatmap.with_stem(f"{args.heatmap.stem}_{launched.kernel}")
        )
        _show(launched, args, names, picture)
    return 0


def _show(
    launched: Launched, args: argparse.Namespace, names: set[str] | None, picture: Path | None
) -> None:
    threads = int(np.prod(launched.block))
    print(
        f"\n{launched.kernel} of {launched.path.parent.name}/{launched.path.name}: grid "
        f"{launched.grid}, block {launched.block}"
    )
    if args.block >= np.prod(launched.grid) or args.thread >= threads:
        print(f"  has no block {args.block} with a thread {args.thread}")
        return
    print(
        f"block {args.block}, thread {args.thread} (warp {args.thread // 32}, lane "
        f"{args.thread % 32})"
    )
    show_thread(launched, names, args.accesses)
    if picture:
        found = heatmap.instructions(launched)
        print(heatmap.table(found))
        heatmap.draw(launched, found, picture)
        print(f"drawn into {picture}")


if __name__ == "__main__":
    sys.exit(main())
