"""Judges one reconstruction of one scan: runs every section over the pair once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.report.cases import Case
from fvae_deploy.report.hounsfield import Hounsfield, bland_altman
from fvae_deploy.report.pair import run_sections
from fvae_deploy.report.pictures import Planes
from fvae_deploy.report.structure import Structure
from fvae_deploy.report.survey import Survey
from fvae_deploy.report.thumbnails import add_thumbnails


@dataclass(frozen=True)
class Judged:
    """The numbers of one reconstruction, JSON-ready, and its planes."""

    scan: str
    numbers: dict[str, Any]
    planes: Planes
    thumbnails: list[str]  # of the worst components, in order


def judge(
    case: Case,
    method: str,
    found: Survey,
    reconstruction: Path,
    cost: dict[str, Any] | None,
    progress: Callable[[int], None],
) -> Judged:
    """Judge a reconstruction; `cost` is what making it took, if fvae made it."""
    errors = Hounsfield(found.geometry, case.labels)
    planes = Planes(found.geometry, ("Original", method))
    structure = Structure(found, case.labels is not None)
    run_sections(found, reconstruction, case.labels, [errors, planes, structure], progress)
    numbers: dict[str, Any] = {"method": method, "errors": errors.result()}
    organs = numbers["errors"].pop("organs")
    numbers["organs"] = organs
    numbers["agreement"] = bland_altman(
        [organ["original_mean"] for organ in organs],
        [organ["reconstruction_mean"] for organ in organs],
    )
    worst = structure.result()
    numbers["structure"] = {"found": structure.total, "worst": worst}
    if cost is not None:
        voxels = numbers["errors"]["voxels"]
        numbers["cost"] = cost | {"bits_per_voxel": 8 * cost["bytes"] / voxels}
    pictures = add_thumbnails(worst, found, reconstruction)
    return Judged(case.name, numbers, planes, pictures)
