"""Amounts of memory, ranges and sizes, read from the text that users give."""

from __future__ import annotations

import re

from fvae_deploy.errors import UsageError

UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """Read "700MiB", "2GiB", "1.5 GB" or bytes; raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    unit = {"K": "KIB", "M": "MIB", "G": "GIB", "B": ""}.get(unit, unit)
    if not match or unit not in UNITS:
        raise UsageError(f"expected an amount of memory like 700MiB or 2GiB, found {text!r}")
    return int(float(match.group(1)) * UNITS[unit])


def show_bytes(count: int) -> str:
    """Bytes for people, rounded up, so that what is shown suffices: "700 MiB"."""
    if count < 2**30:
        return f"{-(-count // 2**20)} MiB"
    return f"{-(-100 * count // 2**30) / 100:.2f} GiB"


def slice_range(text: str) -> tuple[int, int]:
    """Read "100:140"; raises UsageError for anything else."""
    try:
        a, b = (int(n) for n in text.split(":"))
    except ValueError:
        raise UsageError(f"expected --slices as a:b, for example 100:140, found {text!r}") from None
    return a, b


def voxels(text: str) -> tuple[int, int, int]:
    """Read "512,512,300"; raises UsageError for anything else."""
    try:
        x, y, z = (int(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"expected --shape as 512,512,300, found {text!r}") from None
    return x, y, z
