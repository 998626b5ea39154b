"""Options of the layout: the sizes of the mesh and the division of the model over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option, some_divisors
from minillm.layout.partition import partition

_MOST_PARTITIONED = 2048  # layers that `auto` partitions, in 2 s at most over 64 stages


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(Record):
    """Layout over the ranks, as in `--tp 2 --pp 2` (docs/parallel.md)."""

    ABSENT: ClassVar[Mapping[str, str]] = {
        "cp": "context parallelism does not exist yet; use --tp with --sequence-parallel",
        "ep": "expert parallelism does not exist yet; use --dp",
    }

    dp: int | None = option(None, at_least=1, resumable=True)
    """Data-parallel ranks, each with its share of the batch; left out: the ranks that tp and pp
    leave."""
    tp: int = option(1, at_least=1, resumable=True)
    """Tensor-parallel ranks, each with its share of every matrix."""
    pp: int = option(1, at_least=1, resumable=True)
    """Pipeline stages, each with its share of the layers."""
    stage_layers: str | None = option(None, resumable=True)
    """Layers of each pipeline stage, as in 3,5; auto: the slowest stage is as fast as can be, with
    the embedding and the head counted; left out: the same number each."""
    sequence_parallel: bool = option(False, resumable=True)
    """Shard norms and dropout along time over the tensor-parallel ranks."""

    def resolve_stage_layers(
        self, layers: int, costs: Callable[[], Sequence[float]]
    ) -> tuple[int, ...]:
        """Return the number of layers of each stage, in order.

        `costs` returns the cost of each layer, that of the embedding and the head in the first and
        the last. It is called for `auto` alone.

        Raises ConfigError if they do not add up to `layers` or are not `pp` numbers above 0.
        """
        pp, given = self.pp, self.stage_layers
        if pp > layers:
            raise ConfigError(
                f"--pp {pp} stages cannot share --layers {layers}; --pp can be "
                f"{some_divisors(layers, near=pp)}"
            )
        even = even_split(layers, pp)
        if given is None:
            if layers % pp:
                fits = some_divisors(layers, near=pp)
                raise ConfigError(
                    f"--layers {layers} does not divide over --pp {pp}; try --stage-layers "
                    f"auto, --stage-layers {comma_list(even)}, or --pp {fits}"
                )
            return even
        if given.strip() == "auto":
            if pp > 1 and layers > _MOST_PARTITIONED:
                raise ConfigError(
                    f"--stage-layers auto takes at most {_MOST_PARTITIONED} layers, but --layers "
                    f"is {layers}; try --stage-layers {comma_list(even)}"
                )
            return partition(costs(), pp) if pp > 1 else even
        words = [word.strip() for word in given.split(",")]
        # 18 digits are below 2^63; Python refuses to read 4300.
        if not all(
            word.isascii() and word.isdigit() and len(word) <= 18 and int(word) > 0
            for word in words
        ):
            raise ConfigError(
                f"--stage-layers {given[:60]!r} must be whole numbers above 0 with commas between, "
                f"as in {comma_list(even)}, or auto"
            )
        sizes = tuple(int(word) for word in words)
        if len(sizes) != pp:
            raise ConfigError(
                f"--stage-layers {given} names {len(sizes)} stages, but --pp is {pp}; pass --pp "
                f"{len(sizes)}, or {comma_list(even)}"
            )
        if sum(sizes) != layers:
            raise ConfigError(
                f"--stage-layers {given} adds up to {sum(sizes)}, but --layers is {layers}; try "
                f"{comma_list(even)}"
            )
        return sizes


def even_split(total: int, parts: int) -> tuple[int, ...]:
    """Cut `total` into `parts` whole numbers as equal as possible, the larger ones in the middle.

    The outer stages also hold the vocabulary.
    """
    base, extra = divmod(total, parts)
    first = (parts - extra) // 2
    return tuple(base + (first <= part < first + extra) for part in range(parts))


def comma_list(sizes: Iterable[int]) -> str:
    """Return sizes as on the command line: (3, 5) -> 3,5."""
    return ",".join(map(str, sizes))
