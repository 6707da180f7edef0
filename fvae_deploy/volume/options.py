"""How a volume is opened."""

from __future__ import annotations

from dataclasses import dataclass

DICOM_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")  # file extensions of archives of DICOM files


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a volume is opened. Formats ignore the options that do not concern them."""

    series: str | None = None
    """SeriesInstanceUID of a DICOM series, or a unique end of it; UID#2 is its second part."""
    level: int = 0
    """Level of a multi-resolution Zarr store; 0 is the finest."""
    skip_unreadable: bool = False
    """Leave out DICOM files that cannot be read, with a remark, instead of refusing them."""
    any_range: bool = False
    """Accept stored values that are not HU."""
