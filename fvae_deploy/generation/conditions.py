"""The conditions of a generation: masks, painted as a volume in HU, and findings as text.

A generator sees a mask in the same way as a CT: its palette turns labels into gray values in HU,
then the VAE encodes them. So a mask is a `Reader` here and is streamed like any other volume.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError
from fvae_deploy.export.generator import OPPOSITE, Masks
from fvae_deploy.organs import FINDINGS, ORGANS, organ_label
from fvae_deploy.volume.base import Geometry, HuFrames, Reader, slab_ranges

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Fit:
    """How a mask's plane lies in the model's: its longer side, in mm, fills the model's square.

    So anatomy keeps its proportions. A plane of the model's own size is used unchanged.
    """

    mask: tuple[int, int]  # voxels
    spacing: tuple[float, float]  # mm
    plane: tuple[int, int]  # the model's pixels
    mirrored: tuple[int, ...] = ()  # axes to flip for the model

    def _positions(self, axis: int) -> NDArray[np.float64]:
        """Return the positions of the model's pixel centres, in voxels of the mask."""
        side = max(n * mm for n, mm in zip(self.mask, self.spacing, strict=True))
        pixel = float(side) / self.plane[axis]
        margin = (side - self.mask[axis] * self.spacing[axis]) / 2
        centres = (np.arange(self.plane[axis], dtype=np.float64) + 0.5) * pixel - margin
        positions: NDArray[np.float64] = centres / self.spacing[axis] - 0.5
        return positions

    def labels(self, mask: Labels) -> Labels:
        """Resample labels [x, y] to the model's plane, nearest neighbour; 0 outside the mask."""
        nearest = [np.rint(self._positions(axis) - 1e-9).astype(np.int64) for axis in (0, 1)]
        inside = [(i >= 0) & (i < n) for i, n in zip(nearest, self.mask, strict=True)]
        rows, columns = (i.clip(0, n - 1) for i, n in zip(nearest, self.mask, strict=True))
        sampled = mask[np.ix_(rows, columns)]
        labels: Labels = np.where(inside[0][:, None] & inside[1][None, :], sampled, 0)
        return np.flip(labels, self.mirrored)

    def volume(self, frames: HuFrames) -> HuFrames:
        """Resample frames [t, X, Y] of the model to the mask's plane, linearly: [t, x, y]."""
        rows, columns = (self._weights(axis) for axis in (0, 1))
        flipped = np.flip(frames, tuple(1 + axis for axis in self.mirrored))
        resampled: HuFrames = np.matmul(np.matmul(rows, flipped), columns.T)
        return resampled

    def _weights(self, axis: int) -> NDArray[np.float32]:
        """Return the linear interpolation as a matrix [voxels of the mask, model's pixels]."""
        count = self.plane[axis]
        position = np.interp(np.arange(self.mask[axis]), self._positions(axis), np.arange(count))
        low = np.floor(position).astype(int).clip(0, count - 1)
        share = (position - low).astype(np.float32)
        matrix = np.zeros((self.mask[axis], count), np.float32)
        row = np.arange(self.mask[axis])
        matrix[row, low] = 1 - share
        matrix[row, np.minimum(low + 1, count - 1)] += share
        return matrix


class PaintedMask:
    """A mask as a volume in HU on the model's plane; see `fvae_deploy.volume.base.Reader`.

    The palette gives the gray values of organs and of the findings in a disease mask. A plane
    that is mirrored against those of training is flipped for the network, and the result is
    flipped back. A mask of fewer slices than `least` is extended by repeating its last slice.
    `labels` maps other label numbers to those of `organs.ORGANS`. Raises ConditionError if the
    masks do not fit each other, the palette or the orientation.
    """

    remarks: tuple[str, ...] = ()

    def __init__(
        self,
        organs: Reader,
        disease: Reader | None,
        masks: Masks,
        plane: tuple[int, int],
        *,
        least: int = 1,
        labels: Mapping[int, int] | None = None,
    ) -> None:
        self.path, self.mask = organs.path, organs.geometry
        self._organs, self._disease, self._masks = organs, disease, masks
        if disease is not None:
            _check_same_grid(organs, disease)
        x, y, z = self.mask.shape
        across, down, _ = self.mask.spacing
        mirrored = _mirrored(self.mask.orientation, masks.orientation, self.path)
        self.fit = Fit((x, y), (across, down), plane, mirrored)
        self.geometry = Geometry((*plane, max(z, least)), self.mask.affine)
        self._labels = dict(labels) if labels is not None else None
        self._hu = {int(label): hu for label, hu in masks.palette.items()}

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield painted frames [t, X, Y], float32; see `Reader.slabs`."""
        with contextlib.closing(self._planes(start)) as planes:
            for each in slab_ranges(self.geometry.shape[2], depths, start):
                yield np.stack(list(islice(planes, len(each))))

    def close(self) -> None:
        """Release the files."""
        self._organs.close()
        if self._disease is not None:
            self._disease.close()

    def _planes(self, start: int) -> Generator[NDArray[np.float32]]:
        """Yield painted planes from `start` on, then the last one without end."""
        first = min(start, self.mask.shape[2] - 1)
        organs = _frames(self._organs, first)
        disease = None if self._disease is None else _frames(self._disease, first)
        painted = np.empty(0, np.float32)
        with contextlib.closing(organs), contextlib.closing(disease or _nothing()) as diseased:
            for index, frame in enumerate(organs, first):
                labels = self._organ_labels(_labels(frame, index, self._organs.path), index)
                if disease is not None:
                    findings = _labels(next(diseased), index, self._disease_path())
                    self._check_findings(findings, index)
                    labels = np.where(findings > 0, findings + self._masks.offset, labels)
                painted = self._paint(self.fit.labels(labels))
                yield painted
        while True:
            yield painted

    def _disease_path(self) -> Path:
        assert self._disease is not None
        return self._disease.path

    def _organ_labels(self, labels: Labels, index: int) -> Labels:
        """Map labels to the numbers of `organs.ORGANS`."""
        present = np.unique(labels)
        if self._labels is None:
            unknown = [int(n) for n in present if n not in ORGANS and n != 0]
            wanted, remedy = "TotalSegmentator's labels 0 to 117", "map them with --labels FILE"
        else:
            unknown = [int(n) for n in present if n not in self._labels and n != 0]
            wanted, remedy = "labels that the --labels file maps", "add them to it"
        if unknown:
            raise ConditionError(
                f"expected {wanted}, found {', '.join(map(str, unknown[:5]))} in slice {index} of "
                f"{self._organs.path}: {remedy}"
            )
        if self._labels is None:
            return labels
        table = np.zeros(int(present.max()) + 1, np.int64)
        for n in present:
            table[n] = self._labels.get(int(n), 0)
        return table[labels]

    def _check_findings(self, labels: Labels, index: int) -> None:
        unknown = [int(n) for n in np.unique(labels) if n not in FINDINGS and n != 0]
        if unknown:
            raise ConditionError(
                f"expected findings 1 to {len(FINDINGS)} in a disease mask, found "
                f"{', '.join(map(str, unknown[:5]))} in slice {index} of {self._disease_path()}: "
                "see docs/generation.md for their numbers"
            )

    def _paint(self, labels: Labels) -> NDArray[np.float32]:
        """Replace labels by their gray values in HU."""
        values, indices = np.unique(labels, return_inverse=True)
        missing = [int(n) for n in values if int(n) not in self._hu]
        if missing:
            raise ConditionError(
                f"expected labels in this generator's palette, found {missing[0]} in "
                f"{self._organs.path}: remove it from the mask, the generator was not trained on it"
            )
        table = np.array([self._hu[int(n)] for n in values], np.float32)
        return table[indices].reshape(labels.shape)


def read_labels(path: Path) -> dict[int, int]:
    """Read a JSON file that maps label numbers to TotalSegmentator's names or numbers.

    Raises ConditionError for any other content.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        return {int(label): _organ(organ) for label, organ in content.items()}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConditionError(
            f'expected JSON like {{"3": "liver", "7": 5}} in {path}, found {reason}: correct it'
        ) from None


def read_findings(text: str, most: int = 1 << 16) -> str:
    """Return findings: `text` itself, or the content of the text file of that name.

    At most `most` bytes of a file are read. Raises ConditionError for an empty text and for a
    file that cannot be read.
    """
    findings, path = text, Path(text)
    with contextlib.suppress(OSError):  # a long text is not a valid file name
        if path.suffix == ".txt" or path.is_file():
            try:
                findings = path.read_bytes()[:most].decode()
            except FileNotFoundError:
                raise ConditionError(
                    f"expected findings in {path}, found no such file: check the path"
                ) from None
            except (OSError, UnicodeDecodeError) as error:
                raise ConditionError(
                    f"expected findings as text in {path}, found {error}: save it as UTF-8"
                ) from None
    findings = " ".join(findings.split())
    if not findings:
        raise ConditionError("expected findings as text, found an empty text: omit --findings")
    return findings


def _nothing() -> Generator[Any]:
    """Yield nothing; a generator, so that it can be closed."""
    yield from ()


def _organ(organ: Any) -> int:
    """Return the label number of an organ's name or number; raises ValueError for others."""
    if isinstance(organ, str):
        try:
            return organ_label(organ)
        except KeyError:
            raise ValueError(f"no organ of TotalSegmentator named {organ!r}") from None
    if isinstance(organ, bool) or not isinstance(organ, int) or (organ and organ not in ORGANS):
        raise ValueError(f"no label {organ!r} of TotalSegmentator")
    return organ


def _frames(reader: Reader, start: int) -> Generator[HuFrames]:
    with contextlib.closing(reader.slabs(8, start=start)) as slabs:  # type: ignore[type-var]
        yield from chain.from_iterable(slabs)


def _labels(frame: HuFrames, index: int, path: Path) -> Labels:
    """Return one frame as labels; raises ConditionError for negative numbers and fractions."""
    labels = frame.astype(np.int64)
    if (labels < 0).any() or (frame.dtype.kind == "f" and (labels != frame).any()):
        wrong = frame[(labels != frame) | (labels < 0)][0]
        raise ConditionError(
            f"expected whole label numbers from 0 on, found {wrong:g} in slice {index} of {path}: "
            "give a label map, not a CT"
        )
    return labels


def _mirrored(actual: str, trained: str, path: Path) -> tuple[int, ...]:
    """Return the axes of the plane that are mirrored against those of training.

    There are none if training knew no orientation ("").
    """
    if not trained:
        return ()
    differs = [a != t for a, t in zip(actual, trained, strict=True)]
    parallel = all(a in (t, OPPOSITE[t]) for a, t in zip(actual, trained, strict=True))
    if not parallel or differs[2]:
        raise ConditionError(
            f"expected a mask with axes {trained}, or mirrored in the plane, found {actual} in "
            f"{path}: reorient it, for example with nibabel.as_closest_canonical"
        )
    return tuple(axis for axis in (0, 1) if differs[axis])


def _check_same_grid(organs: Reader, disease: Reader) -> None:
    a, b = organs.geometry, disease.geometry
    if a.shape != b.shape:
        difference = f"{'x'.join(map(str, b.shape))} instead of {'x'.join(map(str, a.shape))}"
    elif not np.allclose(a.affine, b.affine, atol=1e-3):
        difference = "another affine"
    else:
        return
    raise ConditionError(
        f"expected a disease mask on the grid of {organs.path}, found {difference} in "
        f"{disease.path}: resample it"
    )
