"""Recognises Zarr stores by their names and files, without importing zarr."""

from __future__ import annotations

from pathlib import Path

METADATA = ("zarr.json", ".zarray", ".zgroup")  # every Zarr store has one of these files
ARCHIVES = (".zarr.zip", ".ozx")  # a store in one ZIP file


def is_store(path: Path) -> bool:
    """Return whether a folder holds the metadata of a Zarr array or group, whatever its name."""
    return path.is_dir() and any((path / name).is_file() for name in METADATA)


def is_archive(path: Path) -> bool:
    """Return whether a file is named like a Zarr store in a ZIP file."""
    return path.name.lower().endswith(ARCHIVES) and not path.is_dir()


def is_zarr(path: Path) -> bool:
    """Return whether a path is to be read as Zarr: by its name, or by the files in the folder."""
    return path.name.lower().endswith(".zarr") or is_archive(path) or is_store(path)
