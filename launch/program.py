"""Launch of a training run: `minillm launch slurm --nodes 4 -- TRAIN FLAGS`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from minillm.launch import kubernetes, local, slurm
from minillm.launch.options import Kind

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import known_name
from minillm.comm.process import main_guard

KINDS: Mapping[str, Kind] = {
    "local": local.KIND,
    "slurm": slurm.KIND,
    "kubernetes": kubernetes.KIND,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the text of a launch; return the exit status."""
    return main_guard(lambda: _launch(list(sys.argv[1:] if argv is None else argv)))


def _launch(argv: list[str]) -> int:
    own, words = split_words(argv)
    if not own or own[0] in ("-h", "--help"):
        if not own:
            raise ConfigError(f"name a launch: {', '.join(KINDS)}; see minillm launch --help")
        print(usage())
        return 0
    name = known_name(own[0], KINDS, "launch")
    kind = KINDS[name]
    try:
        options = parse_flags(kind.options, own[1:], prog=f"minillm launch {name}")
    except ConfigError as error:
        hint = (
            "" if "--" in argv else f"; flags of train follow --: minillm launch {name} -- --tp 2"
        )
        raise ConfigError(f"{error}{hint}") from None
    print(kind.run(options, words), end="")
    return 0


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--` and those behind it."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def usage() -> str:
    """Return the help of all kinds."""
    width = max(map(len, KINDS)) + 2
    lines = [f"  {name:<{width}}{kind.sentence}" for name, kind in KINDS.items()]
    head = "usage: minillm launch KIND [OPTIONS] -- [FLAGS OF TRAIN]\n\nkinds:"
    return "\n".join([head, *lines, "", "minillm launch KIND --help lists the options of one."])


if __name__ == "__main__":
    sys.exit(main())
