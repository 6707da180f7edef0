"""Judges one reconstruction of one scan: runs every section over the pair once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.report.edges import Edges
from fvae_deploy.report.hounsfield import Hounsfield, bland_altman
from fvae_deploy.report.jpegls import JpegLs
from fvae_deploy.report.pair import Section, halo_of, run_sections
from fvae_deploy.report.perceptual import Lpips
from fvae_deploy.report.pictures import Planes
from fvae_deploy.report.seams import Seams
from fvae_deploy.report.structure import Structure
from fvae_deploy.report.surfaces import Surfaces
from fvae_deploy.report.survey import Survey
from fvae_deploy.report.texture import Texture
from fvae_deploy.report.thumbnails import add_thumbnails


@dataclass(frozen=True)
class Judged:
    """The numbers of one reconstruction, JSON-ready, and its planes."""

    scan: str
    numbers: dict[str, Any]
    planes: Planes
    thumbnails: list[str]  # of the worst components, in order


def judge(
    scan: str,
    method: str,
    maps: dict[str, Path],
    found: Survey,
    reconstruction: Path,
    cost: dict[str, Any] | None,
    jpegls: JpegLs,
    progress: Callable[[int], None],
) -> Judged:
    """Judge a reconstruction; `maps` are label maps: `organs`, `organs_after`, `organs_again`.

    `cost` is what making it took, if a model made it.
    """
    labels = maps.get("organs")
    labelled = labels is not None
    errors = Hounsfield(found.geometry, labels, found.window)
    planes = Planes(found.geometry, ("Original", method))
    surfaces = Surfaces(found, halo_of(found.geometry) * found.geometry.spacing[2])
    structure, texture = Structure(found, labelled), Texture(found, labelled)
    edges, seams = Edges(found), Seams(found.geometry)
    perceptual = Lpips(found.geometry, found.window)
    sections: list[Section] = [
        errors,
        perceptual,
        planes,
        structure,
        texture,
        edges,
        surfaces,
        seams,
    ]
    run_sections(found, reconstruction, maps, sections, progress)
    numbers: dict[str, Any] = {"method": method, "errors": errors.result()}
    numbers["errors"]["lpips"] = perceptual.result()
    organs = numbers["errors"].pop("organs")
    numbers["organs"] = organs
    numbers["agreement"] = bland_altman(
        [organ["original_mean"] for organ in organs],
        [organ["reconstruction_mean"] for organ in organs],
    )
    numbers["structure"] = structure.result()
    numbers["surfaces"] = surfaces.result()
    numbers["texture"], numbers["edges"] = texture.result(), edges.result()
    numbers["seams"] = seams.result(cost)
    if cost is not None:
        bits = 8 * cost["bytes"] / numbers["errors"]["voxels"]
        numbers["cost"] = cost | {"bits_per_voxel": bits, "jpeg_ls": jpegls.beside(bits)}
    pictures = add_thumbnails(numbers["structure"]["worst"], found, reconstruction)
    return Judged(scan, numbers, planes, pictures)
