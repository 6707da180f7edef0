"""What a batch's folder holds beside its scans, and whether a scan was to be expected there.

An image that cannot be read makes the batch fail, after all scans have run, where it should have
been a scan: in the batch's folder unless a scan has its name, and in a folder below it from which
nothing was taken. So does a DICOM series that continues in another folder. Everything else, such as
pictures, tables, and label maps beside a scan, is only listed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.zarr_paths import is_zarr

_IMAGES = (  # file extensions of volumes; those that fvae reads are scans
    ".nii .nii.gz .nii.bgz .hdr .img .nrrd .nhdr .mha .mhd .mgz .mgh .mnc .npy .npz .h5 .hdf5 .mat "
    ".dcm .dicom .dic .ima"
)
_PICTURES = ".jpg .jpeg .png .bmp .tif .tiff .gif .webp"


@dataclass(frozen=True)
class Untaken:
    """An entry of a batch's folder that is no scan, and why."""

    path: Path
    reason: str
    fails: bool = False  # whether a scan was to be expected here

    def to_dict(self) -> dict[str, Any]:
        """Return the entry, JSON-ready."""
        return {"input": str(self.path), "reason": self.reason, "fails": self.fails}


def find_untaken(
    folder: Path, taken: Set[Path], places: Iterable[tuple[Path, list[os.DirEntry[str]]]]
) -> list[Untaken]:
    """Return all entries of `places`, folders with their entries, that are not `taken`.

    Files in a folder of DICOM slices that was taken are left to its reader.
    """
    found = []
    for place, entries in places:
        if place in taken:
            continue
        here = [path for path in taken if path.parent == place]
        stems = {_stem(path.name) for path in here}
        slices = []
        for entry in entries:
            path = Path(entry.path)
            searched = entry.is_dir() and path.suffix != ".partial" and not is_zarr(path)
            if path in taken or searched:
                continue
            if _is_damaged_slice(path):
                slices.append(path)
                continue
            expected = _stem(path.name) not in stems if place == folder else not here
            found.append(Untaken(path, *_why(path, expected=expected)))
        if slices:
            reason = f"{len(slices)} files named like DICOM slices cannot be read, first "
            fails = place == folder or not here
            found.append(Untaken(place, f"{reason}{slices[0].name}", fails))
    return found


def series_of(paths: list[Path]) -> tuple[dict[Path, str | None], list[Untaken]]:
    """Return scans with the DICOM series to read where a folder lies within another.

    A folder whose series continues in another one would give a part of a volume: it is not taken,
    nor is a folder within one whose reader reads it too.
    """
    from fvae_deploy.volume.dicom_scan import peek  # imports pydicom

    ends = {path: peek(path) for path in paths if path.is_dir() and not is_zarr(path)}
    owners: dict[str, list[Path]] = defaultdict(list)
    for path, images in ends.items():
        for uid in {series for series, _ in images}:
            owners[uid].append(path)
    untaken: dict[Path, Untaken] = {}
    for uid, holders in owners.items():
        for one, two in combinations(sorted(holders), 2):
            if two.is_relative_to(one):
                untaken[two] = Untaken(two, f"its series is read with the folder {one}")
            elif not ends[one] & ends[two] and one not in untaken and two not in untaken:
                both = os.path.commonpath([one, two])
                for path, other in ((one, two), (two, one)):
                    reason = f"its series continues in {other}: give {both} alone, --series {uid}"
                    untaken[path] = Untaken(path, reason, fails=True)
    chosen: dict[Path, str | None] = {}
    for path in paths:
        if path not in untaken:
            inner = any(path in other.parents for other in ends)
            uids = sorted({series for series, _ in ends.get(path, ())})
            chosen[path] = uids[0] if inner and len(uids) == 1 else None
    return chosen, list(untaken.values())


def check_all_taken(untaken: list[Untaken]) -> None:
    """Raise VolumeError if a scan was to be expected where none was taken."""
    failing = [one for one in untaken if one.fails]
    if failing:
        raise VolumeError(
            f"expected every image to be a scan that can be read, found {len(failing)} not taken, "
            f"first {failing[0].path} ({failing[0].reason}): convert them, or move away what is "
            "no scan"
        )


def shown(untaken: list[Untaken]) -> Iterator[tuple[str, str]]:
    """Yield path and reason of the entries for a table: those that fail, then a few others."""
    failing = [one for one in untaken if one.fails]
    others = [one for one in untaken if not one.fails]
    for one in [*failing, *others[:10]]:
        yield str(one.path), f"not taken: {one.reason}"
    if len(others) > 10:
        yield f"{len(others) - 10} more", "not taken: the report lists them"


def _is_damaged_slice(path: Path) -> bool:
    from fvae_deploy.volume.dicom_scan import is_named_like_a_slice, is_plainly_other

    return is_named_like_a_slice(path.name) and not is_plainly_other(path.name)


def _why(path: Path, *, expected: bool) -> tuple[str, bool]:
    """Return why an entry is no scan, and whether the batch fails if a scan was `expected`."""
    name = path.name.lower()
    if name.endswith(".partial"):
        return "it is what an interrupted run left", False
    if is_zarr(path):
        return "it is no latent store", False
    if name.endswith(tuple(_IMAGES.split())):
        return f"fvae does not read {path.suffix} files here", expected
    if name.endswith(tuple(_PICTURES.split())):
        return "it is a picture, without HU and positions", False
    return "it is no volume", False


def _stem(name: str) -> str:
    """Return a name without its file extensions."""
    return name.lower().partition(".")[0]
