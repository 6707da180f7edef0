"""How far a reconstruction is from its original, in Hounsfield units, streamed.

All measures are of values clipped to [-1000, 1000] HU, the window that models see; what lies
outside cannot come back, and its share is told beside them.

    e    = reconstruction - original              bias = mean e, MAE = mean |e|
    PSNR = 10 log10(2000² / mean e²) in dB        infinite where every e is 0
    p99  = the smallest whole number of HU that 99 % of the |e| do not exceed: the exact
           percentile of whole numbers, and of fractions that percentile rounded up
    SSIM = mean over axial slices of scikit-image's structural_similarity, data range 2000
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.organs import organ_name
from fvae_deploy.quality.picture import ThreePlanes
from fvae_deploy.volume.base import Geometry, HuFrames, Reader
from fvae_deploy.volume.open import open_volume

WINDOW = (-1000, 1000)  # HU
PEAK = WINDOW[1] - WINDOW[0]  # HU
SSIM_SIDE = 7  # voxels: the window of structural_similarity
AFFINE_TOLERANCE = 1e-3  # mm
SLAB_VOXELS = 1 << 21  # voxels of each volume in memory at once
MOST_LABEL = 1 << 15
MOST_ORGANS = 1024  # 16 MB of histograms

Index = NDArray[np.intp]  # [t, x, y]: which row of a tally a voxel belongs to


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors over some voxels; all in HU but for `psnr` (dB, infinite without any error)."""

    voxels: int
    psnr: float
    mae: float
    rmse: float
    p99: int
    max: float
    bias: float


@dataclass(frozen=True, kw_only=True)
class OrganErrors(Errors):
    """Errors inside one organ."""

    label: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Comparison(Errors):
    """Errors over a whole volume, and organ by organ where labels were given.

    `shape` is (x, y, z), `spacing` mm. `clipped` is the share of the original's voxels outside
    [-1000, 1000] HU. `ssim` is None where it was not asked for, or slices are below 7 x 7.
    """

    original: str
    reconstruction: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    ssim: float | None
    clipped: float
    organs: tuple[OrganErrors, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them; an infinite PSNR, which JSON lacks, is null."""
        fields = asdict(self)
        for errors in (fields, *fields["organs"]):
            if math.isinf(errors["psnr"]):
                errors["psnr"] = None
        return fields


class ErrorTally:
    """Running sums of errors, one row per group of voxels; rows are added as they appear.

    Whole numbers are counted, value by value, so their sums are exact. Fractions are summed in
    float64, and only the percentile comes from counts, of |e| rounded up.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((0, 4))  # of 1, e, |e|, e²; exact below 2^53
        self.most = np.zeros(0)
        self.counts = np.zeros((0, PEAK + 1), np.int64)  # of |e| rounded up

    def add(self, error: NDArray[Any], row: Index | None = None, rows: int = 1) -> None:
        """Count errors (HU, within ±2000, any shape) into `row` of `rows`, by default the first."""
        more = rows - len(self.sums)
        if more > 0:
            self.sums = np.pad(self.sums, ((0, more), (0, 0)))
            self.most = np.pad(self.most, (0, more))
            self.counts = np.pad(self.counts, ((0, more), (0, 0)))
        if error.dtype.kind == "i":
            self._add_whole(error, row, len(self.sums))
        else:
            self._add_fractions(error, row, len(self.sums))

    def _add_whole(self, error: NDArray[Any], row: Index | None, rows: int) -> None:
        values = np.arange(-PEAK, PEAK + 1)
        key = error.astype(np.intp)
        key += PEAK
        if row is not None:
            key += row * values.size
        found = np.bincount(key.ravel("K"), minlength=rows * values.size)
        found = found.reshape(rows, values.size)
        self.sums += found @ np.stack((values**0, values, abs(values), values**2), axis=1)
        folded = found[:, PEAK:].copy()
        folded[:, 1:] += found[:, PEAK - 1 :: -1]
        self.counts += folded
        self.most = np.maximum(self.most, ((folded > 0) * values[PEAK:]).max(axis=1))

    def _add_fractions(self, error: NDArray[Any], row: Index | None, rows: int) -> None:
        e = error.astype(np.float64).ravel()
        size, place = np.abs(e), np.zeros(e.size, np.intp) if row is None else row.ravel()
        weights = (np.ones_like(e), e, size, e * e)
        self.sums += np.stack([np.bincount(place, w, minlength=rows) for w in weights], axis=1)
        np.maximum.at(self.most, place, size)
        key = place * (PEAK + 1) + np.ceil(size).astype(np.intp)
        found = np.bincount(key, minlength=rows * (PEAK + 1))
        self.counts += found.reshape(rows, PEAK + 1)

    def total(self) -> ErrorTally:
        """All rows added into one."""
        whole = ErrorTally()
        whole.sums = self.sums.sum(axis=0, keepdims=True)
        whole.most = self.most.max(keepdims=True)
        whole.counts = self.counts.sum(axis=0, keepdims=True)
        return whole

    def errors(self, row: int = 0) -> dict[str, Any]:
        """Fields of an `Errors` over one row's voxels, of which there must be some."""
        voxels, total, size, square = self.sums[row].tolist()
        mean_square = square / voxels
        below = np.cumsum(self.counts[row])
        return {
            "voxels": int(voxels),
            "psnr": 10 * math.log10(PEAK**2 / mean_square) if mean_square else math.inf,
            "mae": size / voxels,
            "rmse": math.sqrt(mean_square),
            "p99": int(np.argmax(below * 100 >= below[-1] * 99)),
            "max": float(self.most[row]),
            "bias": total / voxels,
        }


class OrganRows:
    """Gives each label that occurs a row of a tally, in order of appearance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: list[int] = []
        self._row = np.full(MOST_LABEL, -1, np.intp)

    def of(self, frames: HuFrames) -> Index:
        """Rows of a slab of labels; VolumeError for what no label is."""
        if frames.dtype.kind == "f" and (frames != np.rint(frames)).any():
            raise self._refused("a fraction")
        if (low := frames.min()) < 0 or (high := frames.max()) >= MOST_LABEL:
            raise self._refused(f"{low:g}" if low < 0 else f"{high:g}")
        number = frames.astype(np.intp, copy=False)
        for label in np.flatnonzero(np.bincount(number.ravel("K"))).tolist():
            if self._row[label] < 0:
                self._row[label] = len(self.labels)
                self.labels.append(label)
        if len(self.labels) > MOST_ORGANS:
            raise self._refused(f"more than {MOST_ORGANS} different ones")
        return self._row[number]

    def _refused(self, found: str) -> VolumeError:
        return VolumeError(
            f"expected labels, whole numbers from 0 to {MOST_LABEL - 1}, found {found} in "
            f"{self.path}: give a segmentation of the original"
        )


def compare(
    original: Path | str,
    reconstruction: Path | str,
    labels: Path | str | None = None,
    picture: Path | str | None = None,
    progress: Callable[[int], None] | None = None,
    ssim: bool = True,
) -> Comparison:
    """Measure a reconstruction against its original, slab by slab.

    `labels` is a segmentation of the same geometry: each label but 0 is measured by itself.
    `picture` names a PNG to draw. `progress` is called with the number of slices done since
    the last call. `ssim=False` leaves out what takes most of the time. Memory does not depend
    on z (the picture keeps two lines a slice). Raises VolumeError for volumes that cannot be
    read or whose shapes or affines differ, UsageError for a picture that is no .png.
    """
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(closing(open_volume(path))) for path in (original, reconstruction)
        )
        check_same_place(first, second, "reconstruction")
        segmentation = None
        if labels is not None:
            segmentation = stack.enter_context(closing(open_volume(labels)))
            check_same_place(first, segmentation, "labels")
        planes = ThreePlanes(Path(picture), first.geometry) if picture is not None else None
        running = _Running(first.geometry, OrganRows(Path(labels or "")), ssim)
        for a, b, organs in _slabs(first, second, segmentation):
            done = running.slices
            a, b = running.add(a, b, organs)
            if planes is not None:
                planes.add(done, a, b)
            if progress is not None:
                progress(len(a))
    result = running.result(str(original), str(reconstruction))
    if planes is not None:
        planes.save(headline(result))
    return result


class _Running:
    """What `compare` has measured so far."""

    def __init__(self, geometry: Geometry, rows: OrganRows, ssim: bool) -> None:
        self.geometry, self.rows, self.tally = geometry, rows, ErrorTally()
        self.ssim = ssim and min(geometry.shape[:2]) >= SSIM_SIDE
        self.slices, self.clipped, self.similarity = 0, 0, 0.0

    def add(self, a: HuFrames, b: HuFrames, organs: HuFrames | None) -> tuple[HuFrames, HuFrames]:
        """Measure one slab [t, x, y] of the original, a, and of b; return both clipped."""
        self.clipped += int(np.count_nonzero((a < WINDOW[0]) | (a > WINDOW[1])))
        a, b = np.clip(a, *WINDOW), np.clip(b, *WINDOW)
        if organs is None:
            self.tally.add(_difference(a, b))
        else:
            row = self.rows.of(organs)
            self.tally.add(_difference(a, b), row, len(self.rows.labels))
        if self.ssim:
            self.similarity += sum(map(_similarity, a, b))
        self.slices += len(a)
        return a, b

    def result(self, original: str, reconstruction: str) -> Comparison:
        whole = self.tally.total().errors()
        rows = sorted(zip(self.rows.labels, range(len(self.rows.labels)), strict=True))
        return Comparison(
            original=original,
            reconstruction=reconstruction,
            shape=self.geometry.shape,
            spacing=self.geometry.spacing,
            ssim=self.similarity / self.slices if self.ssim else None,
            clipped=self.clipped / whole["voxels"],
            organs=tuple(
                OrganErrors(label=label, name=organ_name(label), **self.tally.errors(row))
                for label, row in rows
                if label > 0
            ),
            **whole,
        )


def _slabs(
    first: Reader, second: Reader, labels: Reader | None
) -> Iterator[tuple[HuFrames, HuFrames, HuFrames | None]]:
    nx, ny, _ = first.geometry.shape
    depth = max(1, SLAB_VOXELS // (nx * ny))
    organs = repeat(None) if labels is None else labels.slabs(depth)
    yield from zip(first.slabs(depth), second.slabs(depth), organs, strict=False)


def _difference(a: HuFrames, b: HuFrames) -> NDArray[Any]:
    """Subtract a from b without rounding: int16 holds ±2000, and float64 what float32 holds."""
    if a.dtype == b.dtype == np.int16:
        return b - a
    return b.astype(np.float64) - a


def _similarity(a: HuFrames, b: HuFrames) -> float:
    """SSIM of one slice [x, y]. float32 is 1e-9 from float64 here, and takes half the time."""
    from skimage import metrics

    measure: Any = metrics.structural_similarity  # it carries no types
    # Transposed because volumes on disk have x fastest; the measure is the same.
    x, y = a.T.astype(np.float32, copy=False), b.T.astype(np.float32, copy=False)
    return float(measure(x, y, data_range=PEAK))


def check_same_place(original: Reader, other: Reader, role: str) -> None:
    """Raise VolumeError unless both have one shape and, within 0.001 mm, one affine."""
    a, b = original.geometry, other.geometry
    if a.shape != b.shape:
        raise VolumeError(
            f"expected {role} of shape {'x'.join(map(str, a.shape))} as {original.path} has, "
            f"found {'x'.join(map(str, b.shape))} in {other.path}: give the {role} of this scan, "
            "resampled to its grid"
        )
    if (difference := _affine_difference(a, b)) is not None:
        raise VolumeError(
            f"expected {role} to lie where {original.path} lies, found {difference} in "
            f"{other.path}: resample it to the original's grid, or correct its header"
        )


def _affine_difference(a: Geometry, b: Geometry) -> str | None:
    """Name what differs between two affines, the most telling first; None if nothing does."""
    if np.abs(a.affine - b.affine).max() <= AFFINE_TOLERANCE:
        return None
    if np.abs(np.subtract(a.spacing, b.spacing)).max() > AFFINE_TOLERANCE:
        return f"voxels of {_mm(b.spacing)} instead of {_mm(a.spacing)} mm"
    if np.abs(a.affine[:3, :3] - b.affine[:3, :3]).max() > AFFINE_TOLERANCE:
        if a.orientation != b.orientation:
            return f"axes {b.orientation} instead of {a.orientation}"
        return "axes turned by a small angle"
    return f"the origin at {_mm(b.affine[:3, 3])} instead of {_mm(a.affine[:3, 3])} mm"


def _mm(values: Any) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def headline(comparison: Comparison) -> str:
    """One line for people: the measures that are read first."""
    parts = [f"PSNR {comparison.psnr:.2f} dB"]
    if comparison.ssim is not None:
        parts.append(f"SSIM {comparison.ssim:.4f}")
    parts.append(f"MAE {comparison.mae:.2f} HU")
    parts.append(f"99 % within {comparison.p99} HU")
    return " · ".join(parts)
