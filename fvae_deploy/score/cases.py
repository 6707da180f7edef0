"""The two sets of CTs, and what lies beside them by name: label maps, masks, a table of texts."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fvae_deploy.batch.rows import read_rows
from fvae_deploy.errors import UsageError
from fvae_deploy.organs import FINDINGS
from fvae_deploy.report.cases import Case, find_cases, scan_name

FEWEST = 2  # cases of a set: a covariance needs two
CHANNEL = "_0000"  # at the end of an image's name in nnU-Net's datasets

Damaged = list[tuple[Path, str]]


@dataclass(frozen=True)
class Beside:
    """What is known about one case by name: a text, and findings that are 0 or 1."""

    text: str | None
    findings: dict[str, bool]


def find_set(source: str | Path, role: str) -> tuple[list[Case], Damaged]:
    """Return the CTs of a folder, list, file or pattern such as 'made/*.nii.gz', and the damaged.

    Raises UsageError if there are fewer than two.
    """
    text = str(source)
    paths = [Path(text)]
    if glob.has_magic(text) and not os.path.lexists(text):
        paths = [Path(found) for found in sorted(glob.glob(text, recursive=True))]
        if not paths:
            raise UsageError(f"expected CTs that match {text}, found none: check the pattern")
    cases, damaged = find_cases(paths)
    if len(cases) < FEWEST:
        raise UsageError(
            f"expected at least {FEWEST} CTs as {role}, found {len(cases)} in {text}: a set is "
            "needed to compare distributions; fvae report judges single CTs"
        )
    return cases, damaged


def check_apart(real: Sequence[Case], generated: Sequence[Case]) -> None:
    """Raise UsageError if a file is in both sets."""
    known = {(os.path.realpath(case.ct), case.series) for case in real}
    shared = [case for case in generated if (os.path.realpath(case.ct), case.series) in known]
    if shared:
        raise UsageError(
            f"expected other CTs in GENERATED than in REAL, found {len(shared)} in both, first "
            f"{shared[0].ct}: give two sets, for instance two halves of the real ones"
        )


def find_beside(folder: Path | None, cases: Sequence[Case], option: str) -> dict[str, Path]:
    """Return the label maps of a folder or list by the names of their cases.

    The name is the file's without extension, below the folder; `case_0000` is also `case`, as in
    nnU-Net's datasets. Raises UsageError if none belongs to a case.
    """
    if folder is None:
        return {}
    maps = {case.name: case.ct for case in find_cases([folder])[0]}
    found = {
        case.name: maps[name]
        for case in cases
        for name in (case.name.removesuffix(CHANNEL), case.name)
        if name in maps
    }
    if not found:
        raise UsageError(
            f"expected label maps in {folder} named as the CTs, such as {cases[0].name}, found "
            f"{', '.join([*maps][:3])}: rename them or correct {option}"
        )
    return found


def read_texts(path: Path | None, cases: Sequence[Case]) -> dict[str, Beside]:
    """Return the rows of a table by the names of their cases.

    Its columns are `ct`, `text`, and findings of CT-RATE by name with 0 or 1, all but the first
    optional. Raises UsageError for other values, a case that is named twice, and if no row belongs
    to a case.
    """
    if path is None:
        return {}
    table: dict[str, Beside] = {}
    for row in read_rows(path, "ct", {"ct", "text", *FINDINGS.values()}):
        name = scan_name(Path(str(row["ct"])))
        if name in table:
            raise UsageError(
                f"expected one row for each CT in {path}, found two for {name}: remove one"
            )
        findings = {}
        for column in FINDINGS.values():
            given = row.get(column)
            value = "" if given is None else str(given).strip()
            if value not in ("", "0", "1"):
                raise UsageError(
                    f"expected 0 or 1 as {column} of {name} in {path}, found {value!r}: correct "
                    "the table"
                )
            if value:
                findings[column] = value == "1"
        text = str(row.get("text") or "").strip()
        table[name] = Beside(text or None, findings)
    found = {case.name: table[case.name] for case in cases if case.name in table}
    if not found:
        raise UsageError(
            f"expected rows in {path} named as the CTs, such as {cases[0].name}, found "
            f"{', '.join([*table][:3])}: correct the column ct or --texts"
        )
    return found
