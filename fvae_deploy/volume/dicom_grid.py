"""From the positions of slices to the affine of the volume, where they are evenly spaced.

Scanners round positions, often to 0.1 mm, which need not divide the spacing: single gaps then
differ although the slices are regular. So a line is fitted to all positions, and each slice is
judged by its distance from its place on the line.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.dicom_slice import Slice

_TOLERANCE = 0.2  # mm from the place of a slice; at most a fifth of the spacing
_SAME = 1e-3  # mm between two slices at the same position


def in_order(slices: list[Slice]) -> list[Slice]:
    """Return slices sorted along the normal of their plane."""
    normal = _normal(slices[0])
    return sorted(slices, key=lambda one: float(one.position @ normal))


def check_consistent(slices: list[Slice]) -> None:
    """Raise VolumeError if slices differ in size, pixel spacing or orientation."""
    first = slices[0]
    for other in slices[1:]:
        for quantity, one, two in (
            ("size", first.shape, other.shape),
            ("pixel spacing", first.spacing, other.spacing),
            ("orientation", first.orientation, other.orientation),
        ):
            if not np.allclose(one, two, rtol=1e-4, atol=1e-4):
                raise VolumeError(
                    f"expected the same {quantity} in all slices, found "
                    f"{np.asarray(one).tolist()} in {first.name} and "
                    f"{np.asarray(two).tolist()} in {other.name}: put each series into its "
                    "own folder"
                )


def check_numbers(slices: list[Slice]) -> None:
    """Raise VolumeError if InstanceNumber skips a number between two sorted slices.

    Where files were left out, every second slice may be gone, and the rest evenly spaced.
    """
    try:
        numbers = np.array([int(one.image.values["InstanceNumber"]) for one in slices])
    except (KeyError, TypeError, ValueError):
        return
    steps = np.diff(numbers)
    if (steps > 0).all() or (steps < 0).all():
        for place in np.flatnonzero(np.abs(steps) > 1)[:1]:
            raise VolumeError(
                f"expected consecutive slices, found missing slices, InstanceNumber "
                f"{numbers[place]} and {numbers[place + 1]} in {slices[place].name} and "
                f"{slices[place + 1].name}: export the complete series"
            )


def affine_of(slices: list[Slice]) -> NDArray[np.float64]:
    """Return the RAS affine of sorted slices; raises VolumeError if the spacing is uneven."""
    first, count = slices[0], len(slices)
    positions = np.stack([one.position for one in slices])
    if count > 1:
        _check_apart(slices, positions @ _normal(first))
        origin, step = _line(positions)
        _check_on_line(slices, positions - (origin + np.outer(np.arange(count), step)), step)
    elif first.thickness > 0:
        origin, step = first.position, _normal(first) * first.thickness
    else:
        raise VolumeError(
            f"expected SliceThickness in a single slice, found none in {first.image.where}: "
            "add it, or pass the whole series"
        )
    lps = np.eye(4)
    lps[:3, 0] = first.orientation[:3] * first.spacing[0]
    lps[:3, 1] = first.orientation[3:] * first.spacing[1]
    lps[:3, 2], lps[:3, 3] = step, origin
    if not abs(np.linalg.det(lps)) > 0:
        raise VolumeError(
            f"expected an invertible affine, found {lps[:3].tolist()} in {first.image.where}: "
            "export the series again with its geometry"
        )
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _normal(first: Slice) -> NDArray[np.float64]:
    return np.cross(first.orientation[:3], first.orientation[3:])


def _line(positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return origin and step of the line that fits positions [n, 3] best, in mm.

    The fit averages the rounding of all positions; the two ends alone would keep theirs.
    """
    index = np.arange(len(positions)) - (len(positions) - 1) / 2
    step = index @ positions / (index @ index)
    origin = positions.mean(axis=0) + index[0] * step
    return origin.round(10), step.round(10)  # without the rounding errors of this arithmetic


def _check_apart(slices: list[Slice], depths: NDArray[np.float64]) -> None:
    """Raise VolumeError if two slices share a position."""
    gaps = np.diff(depths)
    worst = int(gaps.argmin())
    if gaps[worst] < _SAME:
        one, two = slices[worst], slices[worst + 1]
        names = (one.name, two.name)
        if one.name == two.name:  # in two folders
            names = (one.image.where, two.image.where)
        raise VolumeError(
            f"expected one slice at each position, found {names[0]} and {names[1]} both at "
            f"{depths[worst]:.3f} mm: remove one of them"
        )


def _check_on_line(
    slices: list[Slice], errors: NDArray[np.float64], step: NDArray[np.float64]
) -> None:
    """Raise VolumeError if a slice lies too far from its place on the fitted line.

    `errors` [n, 3] are the distances in mm. Where one of the slices is missing, another one lies at
    least 0.21 times the fitted spacing away from its place, 0.29 times if there are 5 or more.
    """
    normal = _normal(slices[0])
    normal = normal / np.linalg.norm(normal)
    along = errors @ normal
    spacing = abs(float(step @ normal))
    tolerance = min(_TOLERANCE, spacing * (0.2 if len(slices) < 5 else 0.27))
    if np.abs(along).max() > tolerance or np.abs(np.diff(along)).max() > 0.45 * spacing:
        _refuse_spacing(slices, np.array([one.position @ normal for one in slices]))
    aside = np.linalg.norm(errors - np.outer(along, normal), axis=1)
    worst = int(aside.argmax())
    if aside[worst] > _TOLERANCE:
        raise VolumeError(
            f"expected all slice positions on one line, found {slices[worst].name} "
            f"{aside[worst]:.3f} mm away from it: put each series into its own folder"
        )


def _refuse_spacing(slices: list[Slice], depths: NDArray[np.float64]) -> NoReturn:
    """Raise a VolumeError that says how the spacing is uneven."""
    gaps = np.diff(depths)
    for split in range(2, len(gaps) - 1):
        one, two = float(np.median(gaps[:split])), float(np.median(gaps[split:]))
        tolerance = min(0.11, abs(one - two) / 4)  # of positions rounded to 0.1 mm
        if (
            np.abs(gaps[:split] - one).max() <= tolerance
            and np.abs(gaps[split:] - two).max() <= tolerance
        ):
            raise VolumeError(
                f"expected one slice spacing, found {one:.4g} mm up to slice {split + 1} "
                f"({slices[split].name}), then {two:.4g} mm: put the slices of each spacing into "
                "their own folder, or export the series with one spacing"
            )
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    fault = "missing slices" if gaps[worst] > 1.5 * usual else "uneven spacing"
    raise VolumeError(
        f"expected slices {usual:.3f} mm apart, found {fault}, a gap of {gaps[worst]:.3f} mm "
        f"after {depths[worst]:.3f} mm between {slices[worst].name} and {slices[worst + 1].name}: "
        "export the complete series"
    )
