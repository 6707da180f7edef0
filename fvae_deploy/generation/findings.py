"""Disease masks: which finding is where.

    lesions.nii.gz                      a label map with the numbers of the generator's findings
    lesions.nii.gz=1:emphysema,2:linear a label map with other numbers
    lesion.nii.gz=emphysema             one finding, where the value is above 0.5
    lesions.nii.gz=161,150              a 4-D file, one channel a finding
    lesions.nii.gz=0:nodule             some channels of a 4-D file

A finding is its number, its name or the beginning of a word in its name. All masks of a generation
lie on the grid of the organ mask; where they overlap, the later one counts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError, VolumeError
from fvae_deploy.export.generator import Finding
from fvae_deploy.generation.channels import Channels, has_channels
from fvae_deploy.generation.labels import Labels, frames_of, labels_of
from fvae_deploy.volume.base import Geometry, Reader
from fvae_deploy.volume.open import open_volume

THRESHOLD = 0.5  # a voxel shows a finding where its mask is above


@dataclass(frozen=True)
class DiseaseFile:
    """An open file of findings, and what was said about its channels or labels."""

    path: Path
    said: str  # after "=" on the command line; "" if nothing
    source: Reader | Channels

    @property
    def files(self) -> tuple[Path, ...]:
        """Further files that belong to it."""
        return () if isinstance(self.source, Channels) else self.source.geometry.files

    def close(self) -> None:
        """Release the file."""
        self.source.close()


def open_disease(entry: str | Path) -> DiseaseFile:
    """Open FILE or FILE=CLASSES; raises VolumeError if the file cannot be read."""
    text, said = str(entry), ""
    if not Path(text).exists() and "=" in text:
        text, _, said = text.rpartition("=")
        said = said.strip()
        if not said:
            raise ConditionError(f"expected a finding after = in {entry}, found nothing: name it")
    path = Path(text)
    return DiseaseFile(path, said, Channels(path) if has_channels(path) else open_volume(path))


class DiseaseMask:
    """A file of findings on the grid of the organ mask, as one finding per voxel.

    `any_affine` accepts a file whose affine differs from that of the organ mask; `option` is the
    one that named it. Raises ConditionError where grid, channels or names do not fit.
    """

    def __init__(
        self,
        file: DiseaseFile,
        grid: Geometry,
        findings: Sequence[Finding],
        *,
        any_affine: bool = False,
        option: str = "--disease-mask",
    ) -> None:
        self._option = option
        self.path, self._source, self._findings = file.path, file.source, findings
        self.remarks: tuple[str, ...] = ()
        self._high: dict[int, float] = {}  # the one number above 1 in a channel, if there is one
        affine = self._check_shape(grid)
        if not np.allclose(affine, grid.affine, atol=1e-3):
            self._accept_affine(affine, any_affine)
        if not findings:
            raise ConditionError(
                f"expected no disease mask for this generator, which was trained without findings, "
                f"found {self.path}: leave out {self._option}"
            )
        self._channels, self._labels = self._assign(_parsed(file.said, findings))

    @property
    def named(self) -> list[Finding]:
        """The findings that were named for channels or labels; each of them if none was."""
        numbers = {*self._channels.values(), *self._labels.values()}
        return [each for each in self._findings if not numbers or each.number in numbers]

    def close(self) -> None:
        """Release the file."""
        self._source.close()

    def planes(self, start: int) -> Generator[Labels]:
        """Yield the number of the finding in every voxel, [x, y], from slice `start` on."""
        if isinstance(self._source, Channels):
            stacks = self._source.planes(start, list(self._channels))
        else:
            stacks = (frame[None] for frame in frames_of(self._source, start))
        with contextlib.closing(stacks):
            for index, stack in enumerate(stacks, start):
                if self._channels:
                    yield self._marked(stack, index)
                else:
                    yield self._mapped(labels_of(stack[0], index, self.path), index)

    def _check_shape(self, grid: Geometry) -> NDArray[np.float64]:
        """Check the file's shape and return its affine."""
        if isinstance(self._source, Channels):
            self._source.settle(grid.shape)
            return self._source.affine
        shape = self._source.geometry.shape
        if shape != grid.shape:
            raise ConditionError(
                f"expected a disease mask of {_size(grid.shape)} voxels as the organ mask, found "
                f"{_size(shape)} in {self.path}: resample it"
            )
        return self._source.geometry.affine

    def _accept_affine(self, affine: NDArray[np.float64], any_affine: bool) -> None:
        """Add a remark about an affine that is not that of the organ mask, or refuse it."""
        stateless = np.array_equal(np.abs(affine), np.eye(4))
        if not (stateless or any_affine):
            raise ConditionError(
                f"expected a disease mask on the grid of the organ mask, found another affine in "
                f"{self.path}: resample it, or pass --as-published any-affine if its voxels "
                "are those of the organ mask"
            )
        says = "states no position" if stateless else "has another affine"
        self.remarks = (
            f"{self.path.name} {says}: its voxels were taken in the order of the organ mask.",
        )

    def _assign(self, said: list[tuple[int | None, int]]) -> tuple[dict[int, int], dict[int, int]]:
        """Return the finding of each channel, or of each label; none of either: their numbers."""
        keyed = {key: number for key, number in said if key is not None}
        count = self._source.count if isinstance(self._source, Channels) else 0
        if keyed and len(keyed) < len(said):
            raise self._unassigned("each of them once", "one without a number, or one twice")
        if not keyed and len(said) != (count or min(len(said), 1)):
            wanted = f"one finding for each of its {count} channels" if count else "one finding"
            raise self._unassigned(wanted, str(len(said)))
        if count and keyed and max(keyed) >= count:
            raise self._unassigned(f"channels 0 to {count - 1}", f"channel {max(keyed)}")
        if keyed:
            return (keyed, {}) if count else ({}, keyed)
        return dict(enumerate(number for _, number in said)), {}

    def _unassigned(self, wanted: str, found: str) -> ConditionError:
        kind = "channel" if isinstance(self._source, Channels) else "label"
        return ConditionError(
            f"expected {wanted} with {self.path}, found {found}: name them by {kind}, such as "
            f"{self._option} {self.path.name}=0:{self._findings[0].number}"
        )

    def _mapped(self, labels: Labels, index: int) -> Labels:
        """Return the findings of a label map."""
        known = self._labels or {finding.number: finding.number for finding in self._findings}
        present = [int(n) for n in np.unique(labels) if n]
        unknown = [n for n in present if n not in known]
        if unknown:
            wanted = f"labels that {self._option} names" if self._labels else "findings"
            raise ConditionError(
                f"expected {wanted} {numbers(known)} in a disease mask, found "
                f"{', '.join(map(str, unknown[:5]))} in slice {index} of {self.path}: name them, "
                f"such as {self._option} {self.path.name}={unknown[0]}:{self._findings[0].number}"
            )
        table = np.zeros(max(present, default=0) + 1, np.int64)
        for label in present:
            table[label] = known[label]
        found: Labels = table[labels]
        return found

    def _marked(self, stack: NDArray[Any], index: int) -> Labels:
        """Return the findings of channels [C, x, y]; later ones overwrite earlier ones."""
        found = np.zeros(stack.shape[1:], np.int64)
        for (channel, number), values in zip(self._channels.items(), stack, strict=True):
            self._check_marks(values, channel, index)
            found[values > THRESHOLD] = number
        return found

    def _check_marks(self, values: NDArray[Any], channel: int, index: int) -> None:
        """Raise ConditionError for values that are not those of a mask of one finding."""
        if not np.isfinite(values).all():
            raise VolumeError(
                f"expected finite values, found NaN or infinity in slice {index} of {self.path}: "
                "replace them with 0"
            )
        high = {float(n) for n in np.unique(values[values > 1])}
        high |= {self._high[channel]} if channel in self._high else set()
        if values.min() < 0 or len(high) > 1:
            found = (
                f"{values.min():g}"
                if values.min() < 0
                else " and ".join(f"{n:g}" for n in sorted(high)[:2])
            )
            raise ConditionError(
                f"expected a mask of one finding, with 0, one other number, or probabilities up to "
                f"1, found {found} in slice {index} of {self.path}: of a label map, name the "
                f"labels, such as {self._option} {self.path.name}=1:{self._findings[0].number}"
            )
        if high:
            self._high[channel] = high.pop()


def _parsed(said: str, findings: Sequence[Finding]) -> list[tuple[int | None, int]]:
    """Return the key (or None) and the number of each finding in "1:emphysema,2:nodule"."""
    if not said:
        return []
    if re.match(r"\s*\d+\s*:", said):
        pairs = (item.partition(":") for item in re.split(r",(?=\s*\d+\s*:)", said))
        return [(int(key), finding_number(name, findings)) for key, _, name in pairs]
    with contextlib.suppress(ConditionError):  # a name may contain a comma
        return [(None, finding_number(said, findings))]
    return [(None, finding_number(name, findings)) for name in said.split(",")]


def finding_number(name: str, findings: Sequence[Finding]) -> int:
    """Return the number of a finding, given by number, name, or the beginning of a word in it.

    Raises ConditionError for a name of none or of several.
    """
    text = " ".join(name.replace("_", " ").lower().split())
    fits = [f for f in findings if text in (str(f.number), f.name.lower())]
    if not fits and text and not text.isdecimal():
        fits = [f for f in findings if re.search(rf"\b{re.escape(text)}", f.name.lower())]
    if len(fits) != 1:
        several = f", which is in the names of {len(fits)}" if fits else ""
        raise ConditionError(
            f"expected a finding of this generator, found {name.strip()!r}{several}: choose one of "
            + "; ".join(f"{f.number} {f.name}" for f in findings)
        )
    return fits[0].number


def numbers(labels: Iterable[int]) -> str:
    """Return whole numbers as text, such as "150 to 157, 159"."""
    runs: list[list[int]] = []
    for label in sorted(labels):
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ", ".join(str(run[0]) + (f" to {run[-1]}" if len(run) > 1 else "") for run in runs)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
