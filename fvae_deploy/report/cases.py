"""Which scans a report judges, and what is given beside each: a reconstruction, label maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fvae_deploy.batch.rows import read_rows
from fvae_deploy.batch.scans import LISTS, search
from fvae_deploy.errors import UsageError
from fvae_deploy.volume.suffixes import FILES
from fvae_deploy.volume.zarr_paths import is_zarr

GIVEN = "given"  # the method of a reconstruction that is given
COLUMNS = {"ct", "series", "reconstruction", "labels", "reconstruction_labels", "method"}


@dataclass(frozen=True)
class Case:
    """One original, and what is given beside it."""

    name: str
    ct: Path
    series: str | None = None
    reconstruction: Path | None = None
    labels: Path | None = None
    reconstruction_labels: Path | None = None
    method: str = GIVEN


def find_cases(
    sources: Sequence[Path],
    reconstructions: Sequence[Path] = (),
    labels: Sequence[Path] = (),
    reconstruction_labels: Sequence[Path] = (),
) -> tuple[list[Case], list[tuple[Path, str]]]:
    """Return the scans of files, DICOM folders, folders of scans and lists, and what is damaged.

    The second part names files of a folder that are no readable scan, with the reason. Where
    reconstructions or labels are given, there must be one for each source, in the same order.
    Raises UsageError if these numbers differ, or a source does not exist or holds no scan.
    """
    given = {
        "--reconstruction": reconstructions,
        "--labels": labels,
        "--reconstruction-labels": reconstruction_labels,
    }
    for option, paths in given.items():
        if paths and len(paths) != len(sources):
            raise UsageError(
                f"expected one {option} for each of {len(sources)} CTs, found {len(paths)}: give "
                "them in the same order, or write a list with columns"
            )
    cases: list[Case] = []
    damaged: list[tuple[Path, str]] = []
    for number, source in enumerate(sources):
        found, bad = _found(source)
        one, map_, map_after = (paths[number] if paths else None for paths in given.values())
        beside = one or map_ or map_after
        if beside and len(found) != 1:
            raise UsageError(
                f"expected one CT beside each reconstruction or label map, found {len(found)} in "
                f"{source}: write a list with the columns ct, reconstruction and labels"
            )
        if beside:
            found = [Case(found[0].name, found[0].ct, found[0].series, one, map_, map_after)]
        cases += found
        damaged += bad
    _check(cases)
    return _told_apart(cases), damaged


def _check(cases: list[Case]) -> None:
    """Raise UsageError for labels of a reconstruction alone, and for a method named twice."""
    seen = set[tuple[Path, str | None, str]]()
    for case in cases:
        if case.reconstruction_labels is not None and case.labels is None:
            raise UsageError(
                f"expected labels of the original beside those of its reconstruction, found none "
                f"for {case.ct}: give both label maps"
            )
        row = case.ct, case.series, case.method
        if row in seen:
            raise UsageError(
                f"expected each reconstruction of a CT under its own name, found two of "
                f"{case.ct} named {case.method}: name them in a column method"
            )
        seen.add(row)


def _found(source: Path) -> tuple[list[Case], list[tuple[Path, str]]]:
    """Return the scans of one source, and the damaged files of a folder."""
    if source.suffix in LISTS:
        return _listed(source), []
    if not os.path.lexists(source):
        raise UsageError(f"expected CTs at {source}, found nothing: check the path")
    if not source.is_dir() or is_zarr(source):
        return [Case(scan_name(source), source)], []
    scans, untaken = search("report", source, source / ".none", ".html")
    cases = [Case(_relative(scan.source, source), scan.source, scan.series) for scan in scans]
    return cases, [(one.path, one.reason) for one in untaken if one.fails]


def _listed(path: Path) -> list[Case]:
    def beside(row: dict[str, str], column: str) -> Path | None:
        return path.parent / row[column] if row.get(column) else None

    return [
        Case(
            scan_name(Path(row["ct"])),
            path.parent / row["ct"],
            row.get("series") or None,
            beside(row, "reconstruction"),
            beside(row, "labels"),
            beside(row, "reconstruction_labels"),
            row.get("method") or GIVEN,
        )
        for row in read_rows(path, "ct", COLUMNS)
    ]


def scan_name(path: Path) -> str:
    """Return the name of a scan: its file's or folder's, without the extensions of volumes."""
    name = path.resolve().name
    for suffix in sorted((*FILES, ".zarr"), key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def _relative(path: Path, folder: Path) -> str:
    inner = path.relative_to(folder)
    return str(inner.with_name(scan_name(path))) if inner.parts else scan_name(path)


def _told_apart(cases: list[Case]) -> list[Case]:
    """Give scans of the same name numbers; rows of one CT with other methods share one."""
    found: dict[str, list[tuple[Path, str | None]]] = {}
    named = []
    for case in cases:
        scans, one = found.setdefault(case.name, []), (case.ct, case.series)
        if one not in scans:
            scans.append(one)
        place = scans.index(one)
        named.append(replace(case, name=f"{case.name} ({place + 1})") if place else case)
    return named
