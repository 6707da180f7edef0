"""What a generation is given: masks painted as a volume in HU, and findings as text.

A generator sees a mask as it sees a CT: labels become gray values in HU by its palette, then
the VAE encodes them. So a mask is a `Reader` here, and streams as any volume does.
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
    """A mask's plane in the model's: its longer side, in mm, fills the model's square.

    So anatomy keeps its proportions, and a plane of the model's own size is taken as it is.
    """

    mask: tuple[int, int]  # voxels
    spacing: tuple[float, float]  # mm
    plane: tuple[int, int]  # the model's pixels
    mirrored: tuple[int, ...] = ()  # axes that the model sees the other way round

    def _places(self, axis: int) -> NDArray[np.float64]:
        """Where the model's pixels lie, in voxels of the mask."""
        side = max(n * mm for n, mm in zip(self.mask, self.spacing, strict=True))
        pixel = float(side) / self.plane[axis]
        margin = (side - self.mask[axis] * self.spacing[axis]) / 2
        centres = (np.arange(self.plane[axis], dtype=np.float64) + 0.5) * pixel - margin
        places: NDArray[np.float64] = centres / self.spacing[axis] - 0.5
        return places

    def labels(self, mask: Labels) -> Labels:
        """Sample labels [x, y] at the model's pixels, the nearest voxel's; 0 beyond the mask."""
        found = [np.rint(self._places(axis) - 1e-9).astype(np.int64) for axis in (0, 1)]
        inside = [(f >= 0) & (f < n) for f, n in zip(found, self.mask, strict=True)]
        rows, columns = (f.clip(0, n - 1) for f, n in zip(found, self.mask, strict=True))
        taken = mask[np.ix_(rows, columns)]
        seen: Labels = np.where(inside[0][:, None] & inside[1][None, :], taken, 0)
        return np.flip(seen, self.mirrored)

    def volume(self, frames: HuFrames) -> HuFrames:
        """Sample model frames [t, X, Y] at the mask's voxels, linearly: [t, x, y]."""
        rows, columns = (self._weights(axis) for axis in (0, 1))
        seen = np.flip(frames, tuple(1 + axis for axis in self.mirrored))
        made: HuFrames = np.matmul(np.matmul(rows, seen), columns.T)
        return made

    def _weights(self, axis: int) -> NDArray[np.float32]:
        """Matrix [voxels of the mask, the model's pixels] of linear interpolation."""
        count, places = self.plane[axis], self._places(axis)
        at = np.interp(np.arange(self.mask[axis]), places, np.arange(count))
        low = np.floor(at).astype(int).clip(0, count - 1)
        share = (at - low).astype(np.float32)
        matrix = np.zeros((self.mask[axis], count), np.float32)
        row = np.arange(self.mask[axis])
        matrix[row, low] = 1 - share
        matrix[row, np.minimum(low + 1, count - 1)] += share
        return matrix


class PaintedMask:
    """A mask as a volume in HU on the model's plane; see `fvae_deploy.volume.Reader`.

    Organs and findings of a disease mask are painted by the palette. A plane whose axes run
    against those of training is turned for the network, and what it makes turned back. A mask of
    fewer slices than `least` goes on with its last one. `labels` turns other label numbers into
    those of `organs.ORGANS`. Raises ConditionError where masks do not fit each other, the palette
    or the orientation.
    """

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
        """Yield painted planes from `start` on, the last one again and again."""
        first = min(start, self.mask.shape[2] - 1)
        organs = _frames(self._organs, first)
        disease = None if self._disease is None else _frames(self._disease, first)
        painted = np.empty(0, np.float32)
        with contextlib.closing(organs), contextlib.closing(disease or _nothing()) as ill:
            for index, frame in enumerate(organs, first):
                labels = self._known(_whole(frame, index, self._organs.path), index)
                if disease is not None:
                    found = _whole(next(ill), index, self._disease_path())
                    self._check_findings(found, index)
                    labels = np.where(found > 0, found + self._masks.offset, labels)
                painted = self._painted(self.fit.labels(labels))
                yield painted
        while True:
            yield painted

    def _disease_path(self) -> Path:
        assert self._disease is not None
        return self._disease.path

    def _known(self, labels: Labels, index: int) -> Labels:
        """Labels in the palette's numbers."""
        found = np.unique(labels)
        if self._labels is None:
            strange = [int(n) for n in found if n not in ORGANS and n != 0]
            wanted, remedy = "TotalSegmentator's labels 0 to 117", "map them with --labels FILE"
        else:
            strange = [int(n) for n in found if n not in self._labels and n != 0]
            wanted, remedy = "labels that --labels maps", "add them there"
        if strange:
            raise ConditionError(
                f"expected {wanted}, found {', '.join(map(str, strange[:5]))} in slice {index} of "
                f"{self._organs.path}: {remedy}"
            )
        if self._labels is None:
            return labels
        table = np.zeros(int(found.max()) + 1, np.int64)
        for n in found:
            table[n] = self._labels.get(int(n), 0)
        return table[labels]

    def _check_findings(self, found: Labels, index: int) -> None:
        strange = [int(n) for n in np.unique(found) if n not in FINDINGS and n != 0]
        if strange:
            raise ConditionError(
                f"expected findings 1 to {len(FINDINGS)} in a disease mask, found "
                f"{', '.join(map(str, strange[:5]))} in slice {index} of {self._disease_path()}: "
                "see docs/generation.md for their numbers"
            )

    def _painted(self, labels: Labels) -> NDArray[np.float32]:
        values, places = np.unique(labels, return_inverse=True)
        missing = [int(n) for n in values if int(n) not in self._hu]
        if missing:
            raise ConditionError(
                f"expected labels that this generator knows, found {missing[0]} in "
                f"{self._organs.path}: it was not trained on it, leave it out"
            )
        table = np.array([self._hu[int(n)] for n in values], np.float32)
        return table[places].reshape(labels.shape)


def read_labels(path: Path) -> dict[int, int]:
    """Read a mapping file: JSON of label number to TotalSegmentator's name or number.

    Raises ConditionError for anything else.
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
    """Return findings given as text, or as a file that holds them.

    Raises ConditionError where there are none.
    """
    found, path = text, Path(text)
    with contextlib.suppress(OSError):  # a long text is no name of a file
        if path.suffix == ".txt" or path.is_file():
            try:
                found = path.read_bytes()[:most].decode()
            except FileNotFoundError:
                raise ConditionError(
                    f"expected findings in {path}, found no such file: check the path"
                ) from None
            except (OSError, UnicodeDecodeError) as error:
                raise ConditionError(
                    f"expected findings as text in {path}, found {error}: save it as UTF-8"
                ) from None
    found = " ".join(found.split())
    if not found:
        raise ConditionError(
            "expected findings in words, found an empty text: leave --findings out"
        )
    return found


def _nothing() -> Generator[Any]:
    """Yield nothing; closes like any generator."""
    yield from ()


def _organ(organ: Any) -> int:
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


def _whole(frame: HuFrames, index: int, path: Path) -> Labels:
    """One frame's labels; raises ConditionError where they are no labels."""
    labels = frame.astype(np.int64)
    if (labels < 0).any() or (frame.dtype.kind == "f" and (labels != frame).any()):
        strange = frame[(labels != frame) | (labels < 0)][0]
        raise ConditionError(
            f"expected whole label numbers from 0, found {strange:g} in slice {index} of {path}: "
            "is this a CT? Give its label map"
        )
    return labels


def _mirrored(found: str, wanted: str, path: Path) -> tuple[int, ...]:
    """Axes of the plane that run against those of training; none where training had no order."""
    if not wanted:
        return ()
    against = [f != w for f, w in zip(found, wanted, strict=True)]
    known = all(f in (w, OPPOSITE[w]) for f, w in zip(found, wanted, strict=True))
    if not known or against[2]:
        raise ConditionError(
            f"expected a mask with axes {wanted}, be it mirrored in the plane, found {found} in "
            f"{path}: reorient it, for example with nibabel.as_closest_canonical"
        )
    return tuple(axis for axis in (0, 1) if against[axis])


def _check_same_grid(organs: Reader, disease: Reader) -> None:
    a, b = organs.geometry, disease.geometry
    if a.shape != b.shape:
        found = f"{'x'.join(map(str, b.shape))} instead of {'x'.join(map(str, a.shape))}"
    elif not np.allclose(a.affine, b.affine, atol=1e-3):
        found = "another affine"
    else:
        return
    raise ConditionError(
        f"expected a disease mask on the grid of {organs.path}, found {found} in {disease.path}: "
        "resample it"
    )
