"""How much memory this process may still take: of the machine, its control groups and `ulimit`.

    /proc/meminfo                                      what the machine has
    /proc/self/cgroup, /proc/self/mountinfo            the groups of this process, where they are
    memory.max, memory.high, memory.limit_in_bytes     the limits of a group and of those above it
    RLIMIT_AS, RLIMIT_DATA                             `ulimit -v` and `ulimit -d`

SLURM, systemd and containers nest groups; the limit may be that of any of them.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")


@dataclass(frozen=True)
class Interface:
    """The names that a version of control groups gives to its files."""

    limits: tuple[str, ...]
    usage: str
    files: tuple[str, ...]  # lines of memory.stat: cached files, which give way to other memory


V1 = Interface(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
V2 = Interface(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))


def available_bytes(root: Path = ROOT) -> int:
    """Return the bytes that this process may still take.

    `root` is the folder that contains `proc` and the mounts, for tests.
    """
    found = [_machine(root), *_groups(root), *_process(root)]
    return max(min(found), 0)


def _machine(root: Path) -> int:
    """Return the free memory of the machine; page cache that can be reclaimed counts as free."""
    found = _numbers(root / "proc/meminfo", r"^(MemAvailable):\s+(\d+) kB$")
    if found:
        return found["MemAvailable"] * 1024
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
    except ValueError:  # macOS reports the total, not how much is free
        pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _process(root: Path) -> Iterator[int]:
    """Yield what is left of the limits of `ulimit -v` and `ulimit -d`."""
    used = _numbers(root / "proc/self/status", r"^(VmSize|VmData):\s+(\d+) kB$")
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - used.get(name, 0) * 1024


def _groups(root: Path) -> Iterator[int]:
    """Yield what is left of the limits of each control group that contains this process."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            interface = V1 if controllers else V2
            mount, base = _mount(root, version=1 if controllers else 2)
            for folder in _upwards(mount, base, group):
                yield from _left(folder, interface)


def _mount(root: Path, version: int) -> tuple[Path, str]:
    """Return where the groups of memory are mounted, and the group that is mounted there."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), [*after.split(maxsplit=2), "", "", ""][:3]
        memory = version == 2 or "memory" in options.split(",")
        if len(fields) > 4 and kind == ("cgroup2" if version == 2 else "cgroup") and memory:
            return root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])
    usual = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    return root / usual, "/"


def _upwards(mount: Path, base: str, group: str) -> list[Path]:
    """Return the folders of a group and of those above it, as far as they are mounted.

    A container may see the group's path on the host, of which only its own part is mounted.
    """
    path = PurePosixPath(group)
    inner = path.relative_to(base) if path.is_relative_to(base) else PurePosixPath(group[1:])
    parts = [part for part in inner.parts if part != ".."]
    return [mount.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def _left(folder: Path, interface: Interface) -> Iterator[int]:
    """Yield what is left of each limit of a group; nothing if it has none."""
    used = _number(folder / interface.usage)
    names = "|".join(interface.files)
    cached = sum(_numbers(folder / "memory.stat", rf"^({names}) (\d+)$").values())
    for name in interface.limits:
        limit = _number(folder / name)  # "max" is no number
        if limit is not None and used is not None:
            yield limit - max(used - cached, 0)


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _numbers(path: Path, pattern: str) -> dict[str, int]:
    found = (re.match(pattern, line) for line in _lines(path))
    return {match[1]: int(match[2]) for match in found if match}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    r"""Undo the escapes of mountinfo, such as `\040` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
