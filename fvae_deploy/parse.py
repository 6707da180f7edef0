"""Parse memory sizes, slice ranges, volume shapes and HU windows from command-line text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fvae_deploy.errors import UsageError

UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


HU_WINDOWS = {
    "ct": (-1000.0, 1000.0),
    "soft": (-175.0, 250.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "wide": (-1024.0, 3071.0),
}


def parse_bytes(text: str) -> int:
    """Parse "700MiB", "2GiB", "1.5 GB" or a number of bytes; raises UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    unit = {"K": "KIB", "M": "MIB", "G": "GIB", "B": ""}.get(unit, unit)
    if not match or unit not in UNITS:
        raise UsageError(f"expected a memory size, found {text!r}: write it like 700MiB or 2GiB")
    return int(float(match.group(1)) * UNITS[unit])


def show_bytes(count: int) -> str:
    """Format bytes as text like "700 MiB", rounded up so that the shown size is sufficient."""
    if count < 2**30:
        return f"{-(-count // 2**20)} MiB"
    return f"{-(-100 * count // 2**30) / 100:.2f} GiB"


def slice_range(text: str) -> tuple[int, int]:
    """Parse "100:140"; raises UsageError for anything else."""
    try:
        a, b = (int(n) for n in text.split(":"))
    except ValueError:
        raise UsageError(
            f"expected --slices as a:b, found {text!r}: write it like 100:140"
        ) from None
    return a, b


def voxels(text: str) -> tuple[int, int, int]:
    """Parse "512,512,300"; raises UsageError for anything else."""
    try:
        x, y, z = (int(n) for n in text.split(","))
    except ValueError:
        raise UsageError(
            f"expected --shape as x,y,z, found {text!r}: write it like 512,512,300"
        ) from None
    return x, y, z


def millimetres(text: str) -> tuple[float, float, float]:
    """Parse "0.75,0.75,1.5"; raises UsageError for anything but three positive numbers."""
    try:
        x, y, z = (float(n) for n in text.split(","))
        if min(x, y, z) > 0 and max(x, y, z) < 1000:
            return x, y, z
    except ValueError:
        pass
    raise UsageError(
        f"expected --spacing as x,y,z in mm, found {text!r}: write it like 0.75,0.75,1.5"
    )


def hu_window(given: str | Sequence[float]) -> tuple[float, float]:
    """Return the HU window of a name in HU_WINDOWS, of "LOW:HIGH", or of two numbers.

    Raises UsageError unless -32768 <= low < high <= 32767, the range of stored CTs.
    """
    try:
        if isinstance(given, str):
            given = HU_WINDOWS.get(given.strip().lower()) or [float(n) for n in given.split(":")]
        low, high = map(float, given)
        if -32768 <= low < high <= 32767:
            return low, high
    except (TypeError, ValueError):
        pass
    raise UsageError(
        f"expected --hu-window as LOW:HIGH or one of {', '.join(HU_WINDOWS)}, found {given!r}: "
        "write it like -175:250"
    )
