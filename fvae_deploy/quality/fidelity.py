"""Compare a reconstruction with its original in Hounsfield units, slab by slab.

All metrics are computed on values clipped to a window, by default [-1000, 1000] HU, which is what
most models see. Values outside cannot be reconstructed; the share of such voxels is reported as
`clipped`. The data range R is the width of the window.

    e    = reconstruction - original              bias = mean e, MAE = mean |e|
    PSNR = 10 log10(R² / mean e²)    in dB        infinite if every e is 0
    p99  = the smallest whole number of HU that 99 % of all |e| do not exceed: exact for int16
           volumes; for float32 volumes the percentile rounded up
    SSIM = mean over axial slices of scikit-image's structural_similarity, data range R
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
from fvae_deploy.parse import HU_WINDOWS
from fvae_deploy.parse import hu_window as parse_window
from fvae_deploy.quality.picture import NAMES, Names, ThreePlanes
from fvae_deploy.volume.base import Geometry, HuFrames, Reader
from fvae_deploy.volume.open import open_volume

Window = tuple[float, float]  # HU
WINDOW: Window = HU_WINDOWS["ct"]
SSIM_SIDE = 7  # voxels: the window size of structural_similarity
AFFINE_TOLERANCE = 1e-3  # mm
SLAB_VOXELS = 1 << 21  # voxels of each volume in memory at once
LABEL_LIMIT = 1 << 15  # labels are below this
HISTOGRAMS = 1024 * 2001  # counts of all labels together: 16 MB

Index = NDArray[np.intp]  # [t, x, y]: the row of a tally for each voxel


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors over a set of voxels, all in HU except `psnr` (dB, infinite if there is no error)."""

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
    """Errors over a whole volume, and for each organ if labels were given.

    `shape` is (x, y, z), `spacing` is in mm. `clipped` is the share of the original's voxels
    outside `hu_window`. `ssim` is None if it was not requested or slices are smaller than
    7 x 7.
    """

    original: str
    reconstruction: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    ssim: float | None
    clipped: float
    hu_window: Window
    organs: tuple[OrganErrors, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; an infinite PSNR is None, as JSON has no infinity."""
        fields = asdict(self)
        for errors in (fields, *fields["organs"]):
            if math.isinf(errors["psnr"]):
                errors["psnr"] = None
        return fields


class ErrorTally:
    """Running sums of errors, one row per group of voxels; rows are appended as labels appear.

    Integer errors are counted in a histogram, so their sums are exact. Other errors are summed in
    float64; only their percentile comes from a histogram, of |e| rounded up. `peak` is the data
    range, in HU.
    """

    def __init__(self, peak: float) -> None:
        self.peak, self.bins = peak, math.ceil(peak)
        self.sums = np.zeros((0, 4))  # sums of 1, e, |e|, e²; exact below 2^53
        self.largest = np.zeros(0)  # maximum of |e|
        self.counts = np.zeros((0, self.bins + 1), np.int64)  # histogram of |e| rounded up

    def add(self, error: NDArray[Any], row: Index | None = None, rows: int = 1) -> None:
        """Add errors (HU, within ±peak, any shape) to `row` of `rows`, by default the first row."""
        more = rows - len(self.sums)
        if more > 0:
            self.sums = np.pad(self.sums, ((0, more), (0, 0)))
            self.largest = np.pad(self.largest, (0, more))
            self.counts = np.pad(self.counts, ((0, more), (0, 0)))
        if error.dtype.kind == "i":
            self._add_whole(error, row, len(self.sums))
        else:
            self._add_fractions(error, row, len(self.sums))

    def _add_whole(self, error: NDArray[Any], row: Index | None, rows: int) -> None:
        values = np.arange(-self.bins, self.bins + 1)
        key = error.astype(np.intp)
        key += self.bins
        if row is not None:
            key += row * values.size
        histogram = np.bincount(key.ravel("K"), minlength=rows * values.size)
        histogram = histogram.reshape(rows, values.size)
        self.sums += histogram @ np.stack((values**0, values, abs(values), values**2), axis=1)
        absolute = histogram[:, self.bins :].copy()
        absolute[:, 1:] += histogram[:, self.bins - 1 :: -1]
        self.counts += absolute
        self.largest = np.maximum(self.largest, ((absolute > 0) * values[self.bins :]).max(axis=1))

    def _add_fractions(self, error: NDArray[Any], row: Index | None, rows: int) -> None:
        e = error.astype(np.float64).ravel()
        absolute, index = np.abs(e), np.zeros(e.size, np.intp) if row is None else row.ravel()
        weights = (np.ones_like(e), e, absolute, e * e)
        self.sums += np.stack([np.bincount(index, w, minlength=rows) for w in weights], axis=1)
        np.maximum.at(self.largest, index, absolute)
        key = index * (self.bins + 1) + np.ceil(absolute).astype(np.intp)
        histogram = np.bincount(key, minlength=rows * (self.bins + 1))
        self.counts += histogram.reshape(rows, self.bins + 1)

    def total(self) -> ErrorTally:
        """Return a tally with all rows added up in one row."""
        whole = ErrorTally(self.peak)
        whole.sums = self.sums.sum(axis=0, keepdims=True)
        whole.largest = self.largest.max(keepdims=True)
        whole.counts = self.counts.sum(axis=0, keepdims=True)
        return whole

    def errors(self, row: int = 0) -> dict[str, Any]:
        """Return the fields of an `Errors` for one row, which must contain voxels."""
        voxels, total, absolute, square = self.sums[row].tolist()
        mean_square = square / voxels
        cumulative = np.cumsum(self.counts[row])
        return {
            "voxels": int(voxels),
            "psnr": 10 * math.log10(self.peak**2 / mean_square) if mean_square else math.inf,
            "mae": absolute / voxels,
            "rmse": math.sqrt(mean_square),
            "p99": int(np.argmax(cumulative * 100 >= cumulative[-1] * 99)),
            "max": float(self.largest[row]),
            "bias": total / voxels,
        }


class OrganRows:
    """Assigns a row of a tally to each label of a segmentation, in order of appearance."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most
        self.labels: list[int] = []
        self._row = np.full(LABEL_LIMIT, -1, np.intp)

    def look_up(self, frames: HuFrames) -> Index:
        """Return the rows of a slab of labels; raises VolumeError for values that are no labels."""
        if frames.dtype.kind == "f" and (frames != np.rint(frames)).any():
            raise self._label_error("a fraction")
        if (low := frames.min()) < 0 or (high := frames.max()) >= LABEL_LIMIT:
            raise self._label_error(f"{low:g}" if low < 0 else f"{high:g}")
        labels = frames.astype(np.intp, copy=False)
        for label in np.flatnonzero(np.bincount(labels.ravel("K"))).tolist():
            if self._row[label] < 0:
                self._row[label] = len(self.labels)
                self.labels.append(label)
        if len(self.labels) > self.most:
            raise self._label_error(f"more than {self.most} different labels")
        return self._row[labels]

    def _label_error(self, found: str) -> VolumeError:
        return VolumeError(
            f"expected labels, whole numbers from 0 to {LABEL_LIMIT - 1}, found {found} in "
            f"{self.path}: pass a segmentation of the original"
        )


def compare(
    original: Path | str,
    reconstruction: Path | str,
    labels: Path | str | None = None,
    picture: Path | str | None = None,
    progress: Callable[[int], None] | None = None,
    ssim: bool = True,
    names: Names = NAMES,
    hu_window: str | Window = WINDOW,
) -> Comparison:
    """Compare a reconstruction with its original, slab by slab.

    `labels` is a segmentation with the same geometry; each label except 0 also gets its own
    errors. `picture` is the path of a PNG to draw, in which `names` label the two volumes.
    `progress` is called with the number of slices done since the last call. `ssim=False` skips
    SSIM, which takes most of the time. All metrics are of values clipped to `hu_window`, two
    numbers, "low:high" or a name in `parse.HU_WINDOWS`. Memory does not depend on z, except that
    the picture stores two lines per slice. Raises VolumeError if a volume cannot be read or the
    shapes or affines differ, UsageError if `picture` is not a .png or `hu_window` no window.
    """
    window = parse_window(hu_window)
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(closing(open_volume(path))) for path in (original, reconstruction)
        )
        check_same_place(first, second, "reconstruction")
        segmentation = None
        if labels is not None:
            segmentation = stack.enter_context(closing(open_volume(labels)))
            check_same_place(first, segmentation, "labels")
        planes = (
            ThreePlanes(Path(picture), first.geometry, names=names) if picture is not None else None
        )
        running = _Running(first.geometry, Path(labels or ""), window, ssim)
        for a, b, organs in _slabs(first, second, segmentation):
            z = running.slices
            a, b = running.add(a, b, organs)
            if planes is not None:
                planes.add(z, a, b)
            if progress is not None:
                progress(len(a))
    result = running.result(str(original), str(reconstruction))
    if planes is not None:
        planes.save(headline(result))
    return result


class _Running:
    """The running metrics of `compare`."""

    def __init__(self, geometry: Geometry, labels: Path, window: Window, ssim: bool) -> None:
        self.geometry, self.window = geometry, window
        # Whole numbers, so that integers stay integers when they are clipped.
        low, high = (int(n) if n.is_integer() else n for n in window)
        self.bounds, self.peak = (low, high), high - low
        self.tally = ErrorTally(self.peak)
        self.rows = OrganRows(labels, HISTOGRAMS // (self.tally.bins + 1))
        self.ssim = ssim and min(geometry.shape[:2]) >= SSIM_SIDE
        self.slices, self.clipped, self.similarity = 0, 0, 0.0

    def add(self, a: HuFrames, b: HuFrames, organs: HuFrames | None) -> tuple[HuFrames, HuFrames]:
        """Add a slab [t, x, y] of the original, `a`, and of `b`; return both clipped."""
        self.clipped += int(np.count_nonzero((a < self.bounds[0]) | (a > self.bounds[1])))
        a, b = np.clip(a, *self.bounds), np.clip(b, *self.bounds)
        if organs is None:
            self.tally.add(difference(a, b))
        else:
            row = self.rows.look_up(organs)
            self.tally.add(difference(a, b), row, len(self.rows.labels))
        if self.ssim:
            self.similarity += sum(similarity(*pair, self.peak) for pair in zip(a, b, strict=True))
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
            hu_window=self.window,
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


def difference(a: HuFrames, b: HuFrames) -> NDArray[Any]:
    """Return b - a without rounding: int32 is exact for int16, and float64 for float32."""
    if a.dtype == b.dtype == np.int16:
        return np.subtract(b, a, dtype=np.int32)
    return b.astype(np.float64) - a


def similarity(a: HuFrames, b: HuFrames, peak: float) -> float:
    """Return the SSIM of one slice [x, y]; float32 halves the time and differs by 1e-9."""
    from skimage import metrics

    measure: Any = metrics.structural_similarity  # has no type annotations
    # Transposed because x varies fastest in memory; SSIM does not change.
    x, y = a.T.astype(np.float32, copy=False), b.T.astype(np.float32, copy=False)
    return float(measure(x, y, data_range=peak))


def check_same_place(original: Reader, other: Reader, role: str) -> None:
    """Raise VolumeError unless shapes are equal and affines agree within 0.001 mm."""
    a, b = original.geometry, other.geometry
    if a.shape != b.shape:
        raise VolumeError(
            f"expected {role} of shape {'x'.join(map(str, a.shape))} as in {original.path}, "
            f"found {'x'.join(map(str, b.shape))} in {other.path}: pass the {role} of this scan, "
            "resampled to its grid"
        )
    if (difference := _affine_difference(a, b)) is not None:
        raise VolumeError(
            f"expected {role} with the affine of {original.path}, found {difference} in "
            f"{other.path}: resample it to the original's grid, or correct its header"
        )


def _affine_difference(a: Geometry, b: Geometry) -> str | None:
    """Describe how affine b differs from a: spacing, axes or origin; None if they agree."""
    if np.abs(a.affine - b.affine).max() <= AFFINE_TOLERANCE:
        return None
    if np.abs(np.subtract(a.spacing, b.spacing)).max() > AFFINE_TOLERANCE:
        return f"voxels of {_mm(b.spacing)} instead of {_mm(a.spacing)} mm"
    if np.abs(a.affine[:3, :3] - b.affine[:3, :3]).max() > AFFINE_TOLERANCE:
        if a.orientation != b.orientation:
            return f"axes {b.orientation} instead of {a.orientation}"
        return "axes rotated by a small angle"
    return f"the origin at {_mm(b.affine[:3, 3])} instead of {_mm(a.affine[:3, 3])} mm"


def _mm(values: Any) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def headline(comparison: Comparison) -> str:
    """Return the most important metrics in one line of text."""
    parts = [f"PSNR {comparison.psnr:.2f} dB"]
    if comparison.ssim is not None:
        parts.append(f"SSIM {comparison.ssim:.4f}")
    parts.append(f"MAE {comparison.mae:.2f} HU")
    parts.append(f"99 % within {comparison.p99} HU")
    return " · ".join(parts)
