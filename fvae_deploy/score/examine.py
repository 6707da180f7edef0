"""Reads one CT and keeps what the metrics need of it: features and counts, no voxels.

First it is copied, clipped to the window, as `fvae report` does; the copy is then read twice: in
blocks on its own grid, for tissues, organs and noise, and in slices on the common grid, for
features and pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.labels import labels_of
from fvae_deploy.quality.fidelity import SLAB_VOXELS, WINDOW, check_same_place
from fvae_deploy.report.blocks import Arrays, blocks
from fvae_deploy.report.pair import Section, halo_of
from fvae_deploy.report.segment import segment
from fvae_deploy.report.survey import Survey, clipped_to, survey
from fvae_deploy.report.texture import Texture
from fvae_deploy.report.tissues import tissues
from fvae_deploy.score.adapters import Adapters, Judgement
from fvae_deploy.score.adherence import Adherence
from fvae_deploy.score.features import LatentFeatures, clip_features, picture_features
from fvae_deploy.score.grid import CommonGrid, Frame, Spacing
from fvae_deploy.score.histograms import Counts, Histograms
from fvae_deploy.score.networks import FeatureNetwork, Features
from fvae_deploy.score.planes import cut
from fvae_deploy.stream.intensity import ClippingTally
from fvae_deploy.volume.base import Geometry, HuFrames, Reader
from fvae_deploy.volume.open import open_volume
from fvae_deploy.volume.options import ReadOptions

BANDS = 8  # of the frequencies of noise


@dataclass(frozen=True)
class Source:
    """One CT with what lies beside it, by name."""

    name: str
    ct: Path
    series: str | None = None
    labels: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Lens:
    """What CTs are looked at through: the common spacing and the networks, if any."""

    spacing: Spacing
    latents: LatentFeatures
    pictures: FeatureNetwork | None = None
    clips: FeatureNetwork | None = None
    adapters: Adapters = field(default_factory=Adapters)
    segment: bool = False


@dataclass(frozen=True)
class Seen:
    """What is kept of one CT.

    `features` are [n, d] by a name such as "latents axial". `organs` are histograms of HU by organ,
    empty without a label map or mask, `tissues` those of the thresholds' tissues.
    `noise` is in HU, None where there is too little soft tissue. `spectrum` is the noise in HU in
    each of 8 bands of frequencies, up to half a cycle in a voxel of the common grid, or None.
    `digest` is that of the voxels in whole HU; `coarse` [16, 16, 16] are means of cells in HU.
    """

    name: str
    path: str
    facts: dict[str, Any]
    digest: str
    features: dict[str, Features]
    organs: dict[str, Counts]
    tissues: dict[str, Counts]
    noise: float | None
    spectrum: NDArray[np.float64] | None
    coarse: Frame
    pictures: tuple[NDArray[np.int16], ...]
    adherence: dict[str, dict[str, float]] | None
    judgement: Judgement


class CheckedCt:
    """A reader that makes sure that the volume is a CT, and computes a digest of its voxels."""

    def __init__(self, reader: Reader, any_range: bool) -> None:
        self.path, self.geometry = reader.path, reader.geometry
        self._reader, self._any_range = reader, any_range
        self._hash = hashlib.sha256(str(reader.geometry.shape).encode())

    @property
    def remarks(self) -> tuple[str, ...]:
        """The reader's remarks."""
        return self._reader.remarks

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the voxels in whole HU, clipped to the window."""
        return self._hash.hexdigest()

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield slabs; see `Reader.slabs`. Raises VolumeError at the end of what is no CT."""
        tally = ClippingTally()
        for slab in self._reader.slabs(*depths, start=start):
            tally.voxels += slab.size
            tally.minimum = min(tally.minimum, float(slab.min()))
            tally.maximum = max(tally.maximum, float(slab.max()))
            whole = np.rint(clipped_to(slab, WINDOW)).astype("<i2")
            self._hash.update(np.ascontiguousarray(whole).data)
            yield slab
        if not self._any_range:
            tally.check_is_ct()

    def close(self) -> None:
        """Release the file."""
        self._reader.close()


def examine(source: Source, lens: Lens, reading: ReadOptions, work: Path) -> Seen:
    """Read one CT; `work` is an empty folder for copies.

    Raises VolumeError for what is no CT, or whose label map or mask lies on another grid.
    """
    with contextlib.closing(open_volume(source.ct, reading)) as reader:
        for path, role in ((source.labels, "labels"), (source.mask, "mask")):
            if path is not None:
                with contextlib.closing(open_volume(path, any_range=True)) as other:
                    check_same_place(reader, other, role)
        checked = CheckedCt(reader, reading.any_range)
        found = survey(checked, work / "copy.nii", lambda done: None, WINDOW)
        remarks = list(reader.remarks)
    labels = source.labels
    if labels is None and lens.segment:
        labels = segment(found, found.copy, work / "labels.nii.gz")
    sections = _Sections(found, labels, source.mask)
    sections.read()
    grid = CommonGrid(found.geometry, lens.spacing)
    cuts = cut(grid, grid.slices(found.copy))
    features = {
        f"latents {plane}": lens.latents.features(pieces) for plane, pieces in cuts.slices.items()
    }
    if lens.pictures is not None:
        named = picture_features(lens.pictures, cuts, WINDOW)
        features |= {f"pictures {plane}": values for plane, values in named.items()}
    if lens.clips is not None and cuts.clip is not None:
        features["clip"] = clip_features(lens.clips, cuts.clip, WINDOW)
    facts = _facts(found.geometry, grid, found.clipped, remarks)
    return Seen(
        source.name,
        str(source.ct),
        facts | {"labels": None if labels is None else str(source.labels or "TotalSegmentator")},
        checked.digest,
        features,
        sections.organs.result() if sections.organs else {},
        sections.tissues.result(),
        found.noise,
        sections.spectrum(max(lens.spacing[:2])),
        cuts.coarse,
        cuts.pictures,
        None if sections.adherence is None else sections.adherence.result(),
        lens.adapters.judge(source.name, grid, found.copy),
    )


def _facts(
    geometry: Geometry, grid: CommonGrid, clipped: float, remarks: list[str]
) -> dict[str, Any]:
    return {
        "shape": list(geometry.shape),
        "spacing_mm": list(geometry.spacing),
        "orientation": geometry.orientation,
        "resampled": grid.resampled,
        "clipped": clipped,
        "remarks": remarks,
    }


class _Sections:
    """The parts that read a CT in blocks on its own grid.

    Organs are those of the label map, else of the mask. Beside a mask, the label map is compared
    with it, or without one the thresholds' tissues.
    """

    def __init__(self, found: Survey, labels: Path | None, mask: Path | None) -> None:
        self.found = found
        self.maps = {
            name: path for name, path in (("labels", labels), ("mask", mask)) if path is not None
        }
        self._main = next(iter(self.maps), None)
        self.halo = halo_of(found.geometry)
        self.tissues = Histograms(found.window, "tissue")
        self.organs = Histograms(found.window, "organs") if self.maps else None
        self._texture = Texture(found, bool(self.maps))
        self.adherence: Adherence | None = None
        if mask is not None:
            limit = self.halo * found.geometry.spacing[2]
            self.adherence = Adherence(found.geometry, limit, labels is not None)

    def read(self) -> None:
        """Read the copy and the maps once."""
        nx, ny, nz = self.found.geometry.shape
        depth = max(1, SLAB_VOXELS // (nx * ny))
        parts: list[Section] = [self.tissues, self._texture]
        parts += [part for part in (self.organs, self.adherence) if part is not None]
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(contextlib.closing(open_volume(path, any_range=True)))
                for path in (self.found.copy, *self.maps.values())
            ]
            slabs = self._slabs(readers, depth)
            for block in blocks(slabs, max(depth, 2 * self.halo), self.halo, nz):
                for part in parts:
                    part.add(block)

    def _slabs(self, readers: list[Reader], depth: int) -> Iterator[Arrays]:
        z = 0
        for hu, *maps in zip(*(reader.slabs(depth) for reader in readers), strict=True):
            named = {
                name: labels_of(labels, z, path)
                for (name, path), labels in zip(self.maps.items(), maps, strict=True)
            }
            tissue = tissues(hu, self.found.geometry.spacing)
            organs = named.get(self._main or "", tissue)
            yield {"original": hu, "reconstruction": hu, "tissue": tissue, "organs": organs} | named
            z += len(hu)

    def spectrum(self, pixel: float) -> NDArray[np.float64] | None:
        """Return the noise in HU by bands up to 1 / (2 pixel) per mm, in liver or soft tissue."""
        kinds = self._texture.result()
        even = kinds.get("liver") or kinds.get("soft tissue")
        if even is None:
            return None
        frequency = np.array(even["frequency_per_mm"])
        power = np.array(even["before"]["nps"]) * 2 * np.pi * frequency * frequency[1]
        band = (frequency * 2 * pixel * BANDS).astype(int)
        inside = band < BANDS
        variances = np.bincount(band[inside], power[inside], BANDS)
        return np.sqrt(variances)
