"""What a reader of a score should know: few cases, duplicates, other grids, what was left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from fvae_deploy.score.examine import Seen
from fvae_deploy.score.nearest import repeated
from fvae_deploy.score.networks import INCEPTION
from fvae_deploy.score.planes import CLIP
from fvae_deploy.score.rows import Row

FEW = 20  # cases
APART = 0.1  # share of the field of view, or of the number of slices in mm
Cases = Sequence[Seen]


def remarks(real: Cases, generated: Cases, rows: Sequence[Row], names: dict[str, str]) -> list[str]:
    """Return remarks in sentences."""
    found = [*_few(real, generated, rows), *_duplicates(real, generated)]
    found += [*_grids(real, generated), *_labels(real, generated)]
    if "clip" in names:
        short = sum("clip" not in one.features for one in (*real, *generated))
        if short:
            found.append(
                f"{short} CTs have fewer than {CLIP} slices on the common grid and are left out of "
                "FVD."
            )
    return found


def _few(real: Cases, generated: Cases, rows: Sequence[Row]) -> Iterator[str]:
    fewest = min(len(real), len(generated))
    if fewest < FEW:
        yield (
            f"A set has only {fewest} CTs: intervals of fewer than {FEW} cases are too narrow, and "
            "differences between sets of this size may be chance."
        )
    lacking = [row.metric for row in rows if row.part == "" and "vectors" in row.note]
    for metric in dict.fromkeys(lacking):
        yield (
            f"{metric}: a set has no more vectors than features, so its covariance lacks rank and "
            "the distance is far too large. Compare it only with values of as many cases; the "
            "kernel distance has no such error."
        )


def _duplicates(real: Cases, generated: Cases) -> Iterator[str]:
    both = {one.digest for one in real} & {one.digest for one in generated}
    for one in generated:
        if one.digest in both:
            twin = next(other for other in real if other.digest == one.digest)
            yield f"{one.name} of GENERATED has the same voxels as {twin.name} of REAL."
    for role, side in (("REAL", real), ("GENERATED", generated)):
        for names in repeated([(one.name, one.digest) for one in side]):
            yield f"{role} has the same voxels {len(names)} times: {', '.join(names)}."


def _grids(real: Cases, generated: Cases) -> Iterator[str]:
    for role, side in (("REAL", real), ("GENERATED", generated)):
        count = sum(one.facts["resampled"] for one in side)
        if count:
            yield (
                f"{count} of {len(side)} CTs of {role} were resampled to the common spacing, which "
                "smooths them."
            )
    views = [
        np.median(
            [np.multiply(one.facts["shape"], one.facts["spacing_mm"]) for one in side], axis=0
        )
        for side in (real, generated)
    ]
    if (np.abs(views[1] / views[0] - 1) > APART).any():
        a, b = (" x ".join(f"{mm:.0f}" for mm in view) for view in views)
        yield (
            f"The fields of view differ: {a} mm in REAL, {b} mm in GENERATED, by their medians. "
            "Distances of features and of coarse volumes contain that difference."
        )


def _labels(real: Cases, generated: Cases) -> Iterator[str]:
    for role, side in (("REAL", real), ("GENERATED", generated)):
        count = sum(bool(one.organs) for one in side)
        if 0 < count < len(side):
            yield f"{count} of {len(side)} CTs of {role} have a label map or mask."
    have = [any(one.organs for one in side) for side in (real, generated)]
    if have[0] != have[1]:
        role, option = ("REAL", "--real-labels") if have[1] else ("GENERATED", "--masks")
        yield f"HU by organ is left out, since {role} has no label maps: give {option}."


def left_out(rows: Sequence[Row], networks: Collection[str]) -> list[str]:
    """Return what was not measured, with what to give for it; `networks` are those of features."""
    made = {row.metric for row in rows}
    found = []
    if "clip" not in networks:
        found.append(
            "FVD: give I3D as TorchScript with --i3d, the file i3d_torchscript.pt of StyleGAN-V."
        )
    elif not any(metric.startswith("FVD") for metric in made):
        found.append(f"FVD: fewer than 2 CTs of a set have {CLIP} slices.")
    if "pictures" not in networks:
        found.append(
            "FID in three planes: give a network with --features, a TorchScript file, "
            f"module:factory or {INCEPTION}."
        )
    if "noise: difference of means" not in made:
        found.append("Noise: fewer than 2 CTs of a set have enough even soft tissue.")
    if "noise: distance of spectra" not in made:
        found.append("Spectra of noise: fewer than 2 CTs of a set have even squares of 16 voxels.")
    if not any(metric.startswith("mask adherence") for metric in made):
        found.append("Mask adherence: give the masks that the CTs were made from with --masks.")
    for option, metric in (("--clip", "CLIP score"), ("--classifier", "AUC of findings")):
        if metric not in made:
            found.append(f"{metric}: give an adapter with {option} and a table with --texts.")
    return found
