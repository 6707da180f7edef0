"""Organs labelled by TotalSegmentator, where it is installed, in originals and reconstructions."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path

from fvae_deploy.errors import EngineError
from fvae_deploy.quality.fidelity import SLAB_VOXELS
from fvae_deploy.report.pair import with_noise
from fvae_deploy.report.survey import Survey
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume


def check_installed() -> None:
    """Raise EngineError unless TotalSegmentator is installed."""
    if find_spec("totalsegmentator") is None:
        raise EngineError(
            "expected TotalSegmentator for --segment, found none: pip install TotalSegmentator, or "
            "pass --labels"
        )


def segment(found: Survey, volume: Path, output: Path, noise: float = 0.0) -> Path:
    """Label the organs of a volume on the grid of `found`; return the label map, a NIfTI file.

    `noise` of this deviation in HU is added first, for the segmenter's repeatability. Raises
    EngineError with the reason if TotalSegmentator fails.
    """
    from totalsegmentator.python_api import totalsegmentator

    source = output.with_name("segmented.nii")
    geometry = Geometry(found.geometry.shape, found.geometry.affine)
    depth = max(1, SLAB_VOXELS // (geometry.shape[0] * geometry.shape[1]))
    z = 0
    with (
        contextlib.closing(open_volume(volume, any_range=True)) as reader,
        create_volume(source, geometry, "float32") as writer,
    ):
        for slab in reader.slabs(depth):
            writer.write(with_noise(slab, z, noise))
            z += len(slab)
    try:
        totalsegmentator(str(source), str(output), ml=True, quiet=True)
    except (Exception, SystemExit) as error:  # a program of its own: it raises whatever it likes
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise EngineError(
            f"expected TotalSegmentator to label {volume}, found {reason}: run TotalSegmentator on "
            "it alone, or pass --labels"
        ) from error
    return output
