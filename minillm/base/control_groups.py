"""Control groups of Linux: the folders that hold the limits of this process (cgroups(7))."""

from __future__ import annotations

from pathlib import Path


def group_folders(controller: str, root: Path = Path("/")) -> list[tuple[int, Path]]:
    """Return version and folder of this process's groups of `controller`, and of those around them.

    `root` is the root of the file system. Some folders may not exist: inside a container the name
    of a group may be the host's, and the container's own group is mounted as the root.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    mounts = root / "sys/fs/cgroup"
    names = {1: {"/"}, 2: {"/"}}
    tops = {(2, mounts): None, (2, mounts / "unified"): None, (1, mounts / controller): None}
    for line in lines:
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            names[2].add(name or "/")
        elif controller in controllers.split(","):
            names[1].add(name)
            tops[1, mounts / controllers] = None
    found = {
        (version, top / str(folder).lstrip("/")): None
        for version, top in tops
        for name in sorted(names[version])
        for folder in (Path(name), *Path(name).parents)
    }
    return list(found)
