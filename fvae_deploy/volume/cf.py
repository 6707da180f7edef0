"""The CF conventions, as xarray and netCDF write them: packed values, and coordinates of axes."""

from __future__ import annotations

import base64
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError

AIR = -1000  # HU, of voxels that are marked as missing


@dataclass(frozen=True)
class Packing:
    """How stored values become HU: `stored * scale + offset`, and air where one is missing."""

    scale: float = 1.0
    offset: float = 0.0
    missing: tuple[float, ...] = ()
    unsigned: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether stored values are HU."""
        return self.scale == 1 and self.offset == 0 and not self.unsigned

    def unpack(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return values in HU; float64 if they are scaled, else of the stored type or wider."""
        raw = (
            stored.view(f"{stored.dtype.byteorder}u{stored.itemsize}") if self.unsigned else stored
        )
        values: NDArray[Any] = raw
        if not self.is_plain:
            values = raw.astype(np.float64) * self.scale + self.offset
        if self.missing:
            holes = self._is_missing(stored)
            if self.unsigned:
                holes |= self._is_missing(raw)
            if holes.any():
                wide = np.result_type(values.dtype, np.int16)
                values = np.where(holes, np.asarray(AIR, wide), values)
        return values

    def remarks(self) -> list[str]:
        """Return what is done to the stored values, in sentences."""
        remarks = []
        if (self.scale, self.offset) != (1, 0):
            remarks.append(
                f"Stored values are scaled: HU = stored * {self.scale:g} + {self.offset:g}."
            )
        if self.missing:
            marks = " or ".join(f"{value:g}" for value in self.missing)
            remarks.append(f"Voxels marked as missing (stored {marks}) are read as air, {AIR} HU.")
        return remarks

    def _is_missing(self, stored: NDArray[Any]) -> NDArray[np.bool_]:
        holes = np.zeros(stored.shape, np.bool_)
        for value in self.missing:
            if math.isnan(value):
                holes |= np.isnan(stored) if stored.dtype.kind == "f" else False
            elif stored.dtype.kind == "f":
                with np.errstate(over="ignore"):
                    holes |= stored == np.asarray(value, stored.dtype)
            else:
                limits = np.iinfo(stored.dtype)
                if value == int(value) and limits.min <= value <= limits.max:
                    holes |= stored == np.asarray(int(value), stored.dtype)
        return holes


def packing_of(
    attributes: dict[str, Any], dtype: np.dtype[Any], fill_value: Any, path: Path
) -> Packing:
    """Return the packing that the attributes of an array describe.

    `fill_value` is that of a Zarr v2 array which xarray wrote, None for others: xarray keeps
    `_FillValue` there. A fill value of 0, Zarr's default, marks nothing. Raises VolumeError for
    attributes that are no numbers.
    """
    scale = _number(attributes, "scale_factor", 1.0, path)
    offset = _number(attributes, "add_offset", 0.0, path)
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(offset):
        raise VolumeError(
            f"expected a finite scale_factor other than 0 and a finite add_offset, found {scale} "
            f"and {offset} in {path}: correct the attributes"
        )
    missing = [
        _number({name: value}, name, 0.0, path)
        for name in ("_FillValue", "missing_value")
        for value in _values(attributes.get(name))
    ]
    if fill_value is not None and fill_value != 0:
        missing.append(float(fill_value))
    unsigned = str(attributes.get("_Unsigned", "false")).lower() == "true" and dtype.kind == "i"
    unique = tuple({repr(value): value for value in missing}.values())
    return Packing(scale, offset, unique, unsigned)


def _values(value: object) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _number(attributes: dict[str, Any], name: str, default: float, path: Path) -> float:
    value = attributes.get(name, default)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and name in ("_FillValue", "missing_value"):
            return _decode(value)
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise VolumeError(
            f"expected a number as {name}, found {value!r} in {path}: correct the attribute"
        ) from error


def _decode(text: str) -> float:
    """Return a fill value written as text: "NaN", "-32768", or in base64 as xarray writes it."""
    try:
        return float(text)
    except ValueError:
        raw = base64.b64decode(text, validate=True)
        if len(raw) != 8:
            raise ValueError(text) from None
        number: float = struct.unpack("<d", raw)[0]
        return number


def spacing_of(coordinates: NDArray[np.float64], name: str, path: Path) -> tuple[float, float]:
    """Return step and start of the coordinates of an axis.

    Raises VolumeError if there are fewer than two, or if they are not evenly spaced.
    """
    if len(coordinates) < 2:
        raise VolumeError(
            f"expected at least two coordinates along {name}, found {len(coordinates)} in {path}, "
            "which tells no spacing: convert the volume to NIfTI with its voxel size"
        )
    if np.isfinite(coordinates).all():
        step = float(coordinates[-1] - coordinates[0]) / (len(coordinates) - 1)
        even = coordinates[0] + step * np.arange(len(coordinates))
        # Coordinates in float32 are rounded.
        slack = 1e-3 * abs(step) + 1e-6 * float(np.abs(coordinates).max())
        if step != 0 and np.abs(coordinates - even).max() <= slack:
            return step, float(coordinates[0])
    raise VolumeError(
        f"expected evenly spaced coordinates along {name}, found others in {path}: "
        "resample the volume to even spacing"
    )
