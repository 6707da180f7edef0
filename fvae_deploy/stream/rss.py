"""Resident memory of this process."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from pathlib import Path

from fvae_deploy.engines.pages import trim


def peak_rss() -> int:
    """Return the largest resident size so far, in bytes."""
    try:  # of this program only; getrusage also counts the process that forked it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_rss() -> int:
    """Return the current resident size in bytes, or the peak if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss()


def begin_measuring() -> int:
    """Reset the peak, and return the current resident size as the baseline of a run."""
    reset_peak()
    return current_rss()


def reset_peak() -> None:
    """Reset the peak to the current size, where the system supports it (Linux).

    Freed memory is returned to the system first, so that it does not hide later growth.
    """
    trim()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
