"""The change of a CT: where it is, which finding it shows, and the CT on the network's plane.

    --change lesion.nii.gz          one region; its finding is the one that --findings names
    --change map.nii.gz=1:nodule    labels or channels with their findings, as in --disease-mask
    --change lesion                 where --lesion places lesions

Without findings, the region is drawn anew as the organ labels say: a finding can be removed so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.errors import ConditionError, VolumeError
from fvae_deploy.export.generator import Finding
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.generation.conditions import PaintedMask
from fvae_deploy.generation.findings import DiseaseFile, DiseaseMask
from fvae_deploy.generation.given import Given
from fvae_deploy.generation.labels import frames_of
from fvae_deploy.generation.region import Region, region_of
from fvae_deploy.generation.remembered import Findings
from fvae_deploy.generation.upright import Upright
from fvae_deploy.storage.fingerprint import fingerprint_of
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.base import Geometry, HuFrames, Reader, slab_ranges

AIR = -1000.0  # HU around a CT
BODY = -500.0  # HU above which a voxel without a label lies in the body
OUTSIDE = 0.2  # share of a change outside the body that is remarked on


class SameGrid:
    """Organ labels with the geometry of the CT on whose grid they lie; see `Reader`.

    Raises ConditionError if they lie on another.
    """

    def __init__(self, organs: Reader, ct: Reader) -> None:
        found, wanted = organs.geometry, ct.geometry
        if found.shape != wanted.shape or not np.allclose(found.affine, wanted.affine, atol=1e-3):
            size, other = ("x".join(map(str, g.shape)) for g in (wanted, found))
            raise ConditionError(
                f"expected organ labels on the grid of {ct.path}, {size} voxels, found {other} in "
                f"{organs.path}{' with another affine' if size == other else ''}: resample them, "
                "or give those of this CT with --mask"
            )
        self._organs, self.path, self.geometry = organs, organs.path, wanted
        self.drawn: bool = getattr(organs, "drawn", False)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The remarks of the labels."""
        return self._organs.remarks

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield labels [t, x, y]; see `Reader.slabs`."""
        yield from self._organs.slabs(*depths, start=start)

    def close(self) -> None:
        """Do nothing: files are closed by who opened them."""


class OnPlane:
    """A CT on the network's plane, upright, continued with its last slice; see `Reader`."""

    remarks: tuple[str, ...] = ()

    def __init__(self, ct: Reader, mask: PaintedMask) -> None:
        self.path, self.geometry, self._fit = ct.path, mask.geometry, mask.fit
        native = ct.geometry
        self.upright = Upright(
            lambda start: frames_of(ct, start), native.shape, mask.turn, np.float32
        )
        self._depth = mask.mask.shape[2]

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield HU [t, X, Y], float32; see `Reader.slabs`."""
        with contextlib.closing(self.upright.planes(min(start, self._depth - 1))) as frames:
            plane: HuFrames = np.empty(0, np.float32)
            for each in slab_ranges(self.geometry.shape[2], depths, start):
                planes = []
                for index in each:
                    if index < self._depth or not plane.size:
                        plane = self._fit.image(next(frames)[None], AIR)[0]
                    planes.append(plane)
                yield np.stack(planes)

    def close(self) -> None:
        """Release what was turned."""
        self.upright.close()


@dataclass(frozen=True)
class Looked:
    """What is known of a change after one look at the CT and all masks."""

    voxels: int
    before: float  # mean HU in the CT
    in_body: int  # voxels
    whole: bool  # whether the CT has whole HU within int16
    digest: str


@dataclass
class Drawn:
    """What was measured of the result; filled when it is written."""

    after: float | None = None  # mean HU in the region


@dataclass(frozen=True)
class Change:
    """A region of a CT that is drawn anew; `close` releases the CT's planes, not its file."""

    ct: Reader
    where: Findings
    added: tuple[Finding, ...]  # what the region shows; nothing: as the organ labels say
    keep: bool  # whether the CT itself is kept elsewhere, instead of its reconstruction
    labels: Path | None  # file for the label map of what was added
    plane: OnPlane
    planes: Upright  # numbers of findings in the region, in the order of the network
    region: Region
    looked: Looked
    drawn: Drawn = field(default_factory=Drawn)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know."""
        outside, found = 1 - self.looked.in_body / self.looked.voxels, []
        if outside > OUTSIDE:
            found.append(f"{outside:.0%} of the change lies outside the body.")
        plane = self.plane.geometry.shape[:2]
        if not self.keep and plane != self.ct.geometry.shape[:2]:
            found.append(
                f"The whole CT is decoded from the generator's {plane[0]}x{plane[1]} pixels: pass "
                "--keep-original to keep its own voxels elsewhere."
            )
        return tuple(found)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the change, to recognise the same request again."""
        return {"change": self.looked.digest, "keep_original": self.keep}

    def report(self, given: Given) -> dict[str, Any]:
        """Return what was changed, for the report."""
        after = self.drawn.after
        return {
            "region": str(given.change),
            "added": [each.name for each in self.added],
            "organs": str(given.mask or given.patient or given.like),
            "keep_original": self.keep,
            "labels": self.labels and str(self.labels),
            "voxels": self.looked.voxels,
            "latent_frames": len(self.region.cells),
            "mean_hu_before": round(self.looked.before, 1),
            "mean_hu_after": None if after is None else round(after, 1),
        }

    def close(self) -> None:
        """Release what was turned."""
        self.plane.close()
        self.planes.close()


def _look(ct: Reader, where: Findings, mask: PaintedMask) -> Looked:
    """Read CT, organs and change once, slice by slice, in the order of the file."""
    limits = np.iinfo(np.int16)
    voxels, inside, total, whole = 0, 0, 0.0, True
    digest = hashlib.sha256(fingerprint_of(ct.path, ct.geometry.files).encode())
    with contextlib.ExitStack() as stack:
        frames, found, organs = (
            stack.enter_context(contextlib.closing(each))
            for each in (frames_of(ct, 0), where.planes(0), mask.organs())
        )
        for hu, findings, labels in zip(frames, found, organs, strict=True):
            digest.update(findings.astype(np.int16).tobytes())
            if whole and hu.dtype.kind == "f":
                whole = bool(
                    (hu == np.rint(hu)).all() and limits.min <= hu.min() <= hu.max() <= limits.max
                )
            here = findings > 0
            if here.any():
                voxels += int(np.count_nonzero(here))
                total += float(hu[here].sum(dtype=np.float64))
                inside += int(np.count_nonzero((hu[here] > BODY) | (labels[here] > 0)))
    return Looked(voxels, total / max(1, voxels), inside, whole, digest.hexdigest())


def _check(looked: Looked, region: Region, where: Findings, grid: Geometry) -> None:
    """Raise ConditionError for a change of nothing, of everything, or outside the body."""
    if not looked.voxels or not region.cells:
        raise ConditionError(
            f"expected a region to change, found 0 everywhere in {where.path}: draw the region in "
            "it"
        )
    if not looked.in_body:
        raise ConditionError(
            f"expected a change in the body, found {where.path} outside of it, in air without "
            "organ labels: check its position"
        )
    every = len(region.cells) == sum(start < stop for start, stop in region.slices)
    if every and all(cells.all() for cells in region.cells.values()):
        raise ConditionError(
            f"expected a change that leaves some of the CT as it is, found one of "
            f"{looked.voxels / np.prod(grid.shape):.0%} of its voxels in {where.path}: make it "
            "smaller, or generate a CT from the organ labels with --mask alone"
        )


def named_findings(texts: Sequence[str], findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that texts name: by all words of a name, or a word of no other name.

    Words are compared without their plural s, short ones not at all.
    """
    words = {word for text in texts for word in _words(text)}
    names = {finding: _words(finding.name) for finding in findings}
    every = [word for own in names.values() for word in own]
    return [
        finding
        for finding, own in names.items()
        if own <= words or any(every.count(word) == 1 for word in own & words)
    ]


def _words(text: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall(r"[a-z]{4,}", text.lower())}


def finding_of(texts: Sequence[str], findings: Sequence[Finding], change: str) -> Finding:
    """Return the one finding that texts name; raises ConditionError for none or several."""
    found = named_findings(texts, findings)
    if len(found) == 1:
        return found[0]
    shown = ", ".join(repr(each.name) for each in found) or f"none in {texts[0]!r}"
    raise ConditionError(
        f"expected one finding of this generator in the text for --change {change}, found {shown}: "
        f"name it, such as --change {change}={findings[0].number}, as one of "
        + "; ".join(f"{each.number} {each.name}" for each in findings)
    )


def region_mask(
    file: DiseaseFile,
    grid: Geometry,
    given: Given,
    findings: Sequence[Finding],
    any_affine: bool,
) -> tuple[DiseaseMask, list[Finding]]:
    """Return the mask of a change, and the findings that it adds: none without a text or names.

    Raises ConditionError where the file does not fit, or the text does not say which finding.
    """
    known: Sequence[Finding] = findings
    if not file.said and given.told:
        finding = finding_of(given.texts, findings, str(given.change))
        file = dataclasses.replace(file, said=str(finding.number))
    elif not file.said:
        known = (Finding(1, "change"),)
        file = dataclasses.replace(file, said="1")
    mask = DiseaseMask(file, grid, known, any_affine=any_affine, option="--change")
    return mask, [] if known is not findings else mask.named


def change_of(
    ct: Reader,
    where: Findings,
    mask: PaintedMask,
    vae: Manifest,
    given: Given,
    options: RunOptions,
    added: Sequence[Finding],
) -> Change:
    """Look at a change in all slices.

    Raises ConditionError where nothing can be changed, and VolumeError for a CT to be kept whose
    values the output cannot hold.
    """
    planes = Upright(where.planes, ct.geometry.shape, mask.turn, np.int16)
    looked = _look(ct, where, mask)
    shares = (
        mask.fit.image(plane[None] > 0, 0)[0] if plane.any() else None for plane in planes.planes()
    )
    region = region_of(shares, mask.geometry.shape[2], vae)
    _check(looked, region, where, ct.geometry)
    if given.keep_original and options.dtype == "int16" and not looked.whole:
        raise VolumeError(
            f"expected whole HU to keep with --keep-original, found others in {ct.path}: pass "
            "--dtype float32"
        )
    labels = None if given.labels_out is None else Path(given.labels_out)
    plane = OnPlane(ct, mask)
    keep = given.keep_original
    return Change(ct, where, tuple(added), keep, labels, plane, planes, region, looked)
