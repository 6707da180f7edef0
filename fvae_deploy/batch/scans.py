"""Which scans to run, where there are many: those in a folder, or in a list.

    DIR/                               OUTDIR/
      sub-01/ct/sub-01_ct.nii.gz         sub-01/ct/sub-01_ct.zarr
      sub-02/ct/sub-02_ct.nii            sub-02/ct/sub-02_ct.zarr
      patient3/IM0001, IM0002, ...       patient3.zarr

A list is CSV or JSONL: `ct`, and where they are wanted `output` and `series`. Paths are relative
to the list, outputs to OUTDIR.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.batch.rows import check_apart, read_rows
from fvae_deploy.errors import UsageError

LISTS = (".csv", ".jsonl")
VOLUMES = (".nii.gz", ".nii", ".zarr", ".dcm")  # as an output's name may end
FIELDS = {"ct", "output", "series"}


@dataclass(frozen=True)
class Scan:
    """One scan and where its result goes."""

    ct: Path
    output: Path
    series: str | None = None


def are_many(ct: Path, output: Path) -> bool:
    """Whether these are many scans and a folder: an ending tells a single output's format."""
    return ct.suffix in LISTS or (ct.is_dir() and not output.name.endswith(VOLUMES))


def find_scans(ct: Path, output: Path, ending: str) -> list[Scan]:
    """List the scans of a folder or a list, in order; raises UsageError where there are none."""
    if ct.suffix in LISTS:
        rows = read_rows(ct, "ct", FIELDS)
        scans = [_scan(row, ct, output, ending) for row in rows]
    else:
        found = sorted(_volumes(ct, output.resolve()))
        scans = [Scan(path, _beside(path.relative_to(ct), output, ending)) for path in found]
    if not scans:
        raise UsageError(f"expected scans in {ct}, found none: .nii, .nii.gz, .zarr or DICOM")
    check_apart([scan.output for scan in scans], ct)
    return scans


def _volumes(folder: Path, apart: Path) -> Iterator[Path]:
    """Yield what lies below a folder and is a volume: files, Zarr stores, folders of DICOM."""
    if folder.resolve() == apart:
        return
    slices = False
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            continue  # back to where it comes from
        if entry.is_dir():
            if path.suffix == ".zarr":
                yield path
            elif path.suffix != ".partial":
                yield from _volumes(path, apart)
        elif path.name.lower().endswith((".nii", ".nii.gz")):
            yield path
        elif not slices and entry.name != "DICOMDIR":
            slices = _is_dicom(path)
    if slices:
        yield folder


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _beside(path: Path, output: Path, ending: str) -> Path:
    """Name a result as its scan is named, below the folder of results."""
    name = path.name
    for known in VOLUMES:
        if name.lower().endswith(known):
            name = name[: -len(known)]
    return output / path.parent / f"{name or 'scan'}{ending}"


def _scan(row: dict[str, Any], path: Path, output: Path, ending: str) -> Scan:
    ct = Path(str(row["ct"]))
    place = (
        output / str(row["output"]) if row.get("output") else _beside(Path(ct.name), output, ending)
    )
    endings = (ending,) if ending == ".zarr" else VOLUMES  # latents are in one format alone
    if not place.name.endswith(endings):
        raise UsageError(f"expected outputs ending in {', '.join(endings)}, found {place.name}")
    return Scan(path.parent / ct, place, str(row["series"]) if row.get("series") else None)
