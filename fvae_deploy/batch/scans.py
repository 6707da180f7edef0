"""Finds the inputs of batch mode, in a folder or in a list.

    DIR/                               OUTDIR/
      sub-01/ct/sub-01_ct.nii.gz         sub-01/ct/sub-01_ct.zarr
      sub-02/ct/sub-02_ct.nii            sub-02/ct/sub-02_ct.zarr
      patient3/IM0001, IM0002, ...       patient3.zarr

A list is CSV or JSONL with a column `ct` (for decode `latents`) and optionally `output` and
`series`. Paths of inputs are relative to the list, those of outputs to OUTDIR.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.batch.rows import check_apart, read_rows
from fvae_deploy.batch.untaken import Untaken, find_untaken, series_of
from fvae_deploy.errors import UsageError
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.options import DICOM_ARCHIVES
from fvae_deploy.volume.suffixes import FILES, OUTPUTS
from fvae_deploy.volume.zarr_paths import ARCHIVES, is_zarr

LISTS = (".csv", ".jsonl")
VOLUMES = OUTPUTS
_NAMED = sorted(
    {*FILES, *OUTPUTS, *ARCHIVES, *DICOM_ARCHIVES}, key=len, reverse=True
)  # extensions that names lose
_BESIDE = (".img", ".img.gz")  # voxels of the header of the same name


@dataclass(frozen=True)
class Scan:
    """One input of batch mode, and the path of its output."""

    source: Path  # a CT, or for decode a latent store
    output: Path
    series: str | None = None

    def options(self, options: RunOptions) -> RunOptions:
        """Return the batch's options, with the series of this scan."""
        return dataclasses.replace(options, series=self.series or options.series)


def is_batch(source: Path, output: Path) -> bool:
    """Return whether the input is a list or folder of scans, and the output names a folder.

    A file is one input, whatever its name, and so is a Zarr store.
    """
    if source.suffix in LISTS:
        return True
    named = output.name.lower().endswith(VOLUMES)
    return source.is_dir() and not is_zarr(source) and not named


def only_scan(verb: str, source: Path, output: Path) -> Path:
    """Return the one input in a folder whose output names a volume; a file is returned as it is.

    DICOM readers find the series of a folder themselves. Raises UsageError if the folder holds
    several files or stores.
    """
    if not source.is_dir() or is_zarr(source):
        return source
    outputs = Path(os.path.realpath(output))
    found = sorted((_latents if verb == "decode" else _volumes)(source, outputs))
    if not found or any(path.is_dir() and not is_zarr(path) for path in found):
        return source
    if len(found) > 1:
        raise UsageError(
            f"expected one input for {output.name}, found {len(found)} in {source}, first "
            f"{found[0]}: choose one of them, or give a folder as --output for all"
        )
    return found[0]


def find_scans(verb: str, source: Path, output: Path, extension: str) -> list[Scan]:
    """Return the scans of a folder or a list, in order; raises UsageError if there are none."""
    return search(verb, source, output, extension)[0]


def search(
    verb: str, source: Path, output: Path, extension: str
) -> tuple[list[Scan], list[Untaken]]:
    """Return the scans of a folder or a list, and all that the folder holds beside them.

    Raises UsageError if there are no scans.
    """
    if source.suffix in LISTS:
        column = "latents" if verb == "decode" else "ct"
        fields = {column, "output"} | ({"series"} if verb != "decode" else set())
        rows = read_rows(source, column, fields)
        scans, untaken = [_scan(row, column, source, output, extension) for row in rows], []
    else:
        find = _latents if verb == "decode" else _volumes
        outputs = Path(os.path.realpath(output))
        paths = sorted(find(source, outputs))
        series, untaken = series_of(paths) if verb != "decode" else (dict.fromkeys(paths), [])
        scans = [
            Scan(path, _output(path.relative_to(source), output, extension), chosen)
            for path, chosen in series.items()
        ]
        known = {*series, *(one.path for one in untaken)}
        untaken += find_untaken(source, known, _folders(source, outputs))
    if not scans:
        kinds = (
            "latent stores (.zarr)" if verb == "decode" else f"{', '.join(FILES)}, .zarr or DICOM"
        )
        first = next((one for one in untaken if one.fails), untaken[0] if untaken else None)
        beside = (
            f" among {len(untaken)} others, first {first.path} ({first.reason})" if first else ""
        )
        raise UsageError(f"expected {kinds} in {source}, found none{beside}: check the path")
    check_apart([scan.output for scan in scans], source)
    return scans, untaken


def _folders(folder: Path, outputs: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield a folder and all folders below it with their entries, without hidden ones.

    Zarr stores and partial outputs are entries, not folders. `outputs` and links to a folder
    above are skipped.
    """
    real = Path(os.path.realpath(folder))  # unlike resolve, it accepts a circle of links
    if real == outputs:
        return
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    yield folder, entries
    for entry in entries:
        path = Path(entry.path)
        if entry.is_symlink() and real.is_relative_to(os.path.realpath(path)):
            continue
        if path.is_dir() and path.suffix != ".partial" and not is_zarr(path):
            yield from _folders(path, outputs)


def _volumes(folder: Path, outputs: Path) -> Iterator[Path]:
    """Yield the volumes below a folder: files, Zarr stores, folders and archives of DICOM."""
    for place, entries in _folders(folder, outputs):
        slices, archives = False, list[Path]()
        for entry in entries:
            path = Path(entry.path)
            if is_zarr(path):
                yield path
            elif path.is_dir():
                continue
            elif path.name.lower().endswith(FILES):
                if not path.name.lower().endswith(_BESIDE):
                    yield path
            elif _is_archive(path):
                archives.append(path)
            elif not slices and entry.name != "DICOMDIR":
                slices = _is_dicom(path)
        yield from [place] if slices else archives  # beside slices, an archive is a copy


def _latents(folder: Path, outputs: Path) -> Iterator[Path]:
    """Yield the latent stores below a folder."""
    from fvae_deploy.storage.latents import is_latents  # imports zarr

    for _, entries in _folders(folder, outputs):
        for entry in entries:
            path = Path(entry.path)
            if path.suffix == ".zarr" and is_latents(path):
                yield path


def _is_dicom(path: Path) -> bool:
    from fvae_deploy.volume.dicom_scan import holds_dicom  # imports pydicom

    return holds_dicom(path)


def _is_archive(path: Path) -> bool:
    """Return whether a file is an archive of DICOM slices."""
    if not path.name.lower().endswith(DICOM_ARCHIVES):
        return False
    from fvae_deploy.volume.dicom_archive import holds_dicom

    return holds_dicom(path)


def _output(path: Path, output: Path, extension: str) -> Path:
    """Return the path of a result: the name of its input, in the output folder."""
    name = path.name
    for known in _NAMED:
        if name.lower().endswith(known):
            name = name[: -len(known)]
            break
    return output / path.parent / f"{name or 'scan'}{extension}"


def _scan(row: dict[str, Any], column: str, path: Path, output: Path, extension: str) -> Scan:
    source = Path(str(row[column]))
    if row.get("output"):
        target = output / str(row["output"])
    else:
        target = _output(Path(source.name), output, extension)
    allowed = (extension,) if extension == ".zarr" else VOLUMES  # latents have only this format
    if not target.name.lower().endswith(allowed):
        raise UsageError(
            f"expected an output ending in {' or '.join(allowed)}, found {target.name}: rename it"
        )
    return Scan(path.parent / source, target, str(row["series"]) if row.get("series") else None)
