"""Volumes on disk, read and written as frames along z: NIfTI, DICOM series, Zarr arrays.

A volume is an array (x, y, z) as nibabel gives it, in Hounsfield units (HU). It travels as
slabs: consecutive frames `[t, x, y]`, so a frame's height is x and its width is y. Slabs are
int16 where the file's values are whole numbers that fit, float32 otherwise.

    open_volume(path)  -> Reader    chosen by suffix or by what the folder holds
    create_volume(path) -> Writer   chosen by suffix

Nothing here knows about tiles, engines or models.
"""

from __future__ import annotations

from fvae_deploy.volume.base import (
    Geometry,
    Primed,
    Reader,
    Writer,
    create_volume,
    keep_input,
    open_volume,
    state_of,
)

__all__ = [
    "Geometry",
    "Primed",
    "Reader",
    "Writer",
    "create_volume",
    "keep_input",
    "open_volume",
    "state_of",
]
