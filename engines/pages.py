"""Returns unused memory to the system. Works on Linux and does nothing elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

DONTNEED = 4  # MADV_DONTNEED in <sys/mman.h> on Linux
ARENA_MAX = -8  # M_ARENA_MAX in <malloc.h> of the GNU library


def unmap(path: Path) -> None:
    """Drop this process's resident pages of a file that is mapped read-only.

    A runtime that has copied weights into its own layout keeps the file mapped. The unused pages
    count as memory of this process: 125 of 290 MiB for a stage of Wan2.1. A page that is needed
    again is read from the file.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    name = str(path.resolve())
    for line in maps:
        span, rights, *_ = line.split(maxsplit=2)
        # Dropping a writable mapping would lose changes that were made to it.
        if line.endswith(name) and "w" not in rights:
            with contextlib.suppress(ValueError):
                start, stop = (int(address, 16) for address in span.split("-"))
                advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DONTNEED)


def trim() -> None:
    """Return freed memory that the allocator keeps between blocks in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_heap() -> None:
    """Let all threads that start from now on allocate from one heap, as with MALLOC_ARENA_MAX=1.

    The GNU library gives threads heaps of their own, and `trim` returns only a part of what is free
    in these: 450 MiB were left after a few steps of a network in segments.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)
