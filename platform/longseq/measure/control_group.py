"""The limit of memory that a container or a SLURM job has: Linux's control groups, version 1 and 2. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Of version 2, and of 1: the limit, what is used, and the part of that which the kernel gives back when it is needed.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def left_to_the_group(groups: Path = Path("/proc/self/cgroup"), top: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the group of this process, and those that it is part of, still allow; infinite without a limit."""
    rooms = [float("inf")]
    with suppress(OSError):
        for folder, (limit, used, kept) in _groups(groups.read_text(), top):
            with suppress(OSError, ValueError, LookupError):  # "max", or the top, which has none
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                allowed, taken = (float((folder / name).read_text()) for name in (limit, used))
                rooms.append(max(0.0, allowed - taken + float(stat[kept])))
    return min(rooms)


def _groups(lines: str, top: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders, the process's own first, and the names of their files: "0::/job" and "9:memory:/job"."""
    for line in lines.splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, names = (top / "memory", _FILES[1]) if kinds else (top, _FILES[0])
        folder = root / path.lstrip("/")
        yield folder, names
        for parent in folder.parents:
            if parent == top.parent or not parent.is_relative_to(root):
                break
            yield parent, names
