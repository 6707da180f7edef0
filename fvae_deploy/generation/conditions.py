"""The masks of a generation, painted as a volume in HU.

A generator sees a mask in the same way as a CT: its palette turns labels into gray values in HU,
then the VAE encodes them. So a mask is a `Reader` here and is streamed like any other volume.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError
from fvae_deploy.export.generator import Masks
from fvae_deploy.export.manifest import Intensity
from fvae_deploy.generation.findings import DiseaseMask
from fvae_deploy.generation.fit import Fit, Stretched
from fvae_deploy.generation.labels import Labels, frames_of, labels_of
from fvae_deploy.generation.lesions import Lesion
from fvae_deploy.generation.placing import LesionMask
from fvae_deploy.generation.presets import PRESETS, dataset_labels, is_dataset
from fvae_deploy.generation.remembered import Findings, Remembered
from fvae_deploy.generation.turning import TurningWriter, turn_to
from fvae_deploy.generation.upright import Upright
from fvae_deploy.organs import ORGANS, organ_label
from fvae_deploy.volume.base import Geometry, HuFrames, Reader, Writer, slab_ranges


class PaintedMask:
    """A mask as a volume in HU on the model's plane; see `fvae_deploy.volume.base.Reader`.

    The palette gives the gray values of organs and of the findings in disease masks, of which the
    later one counts where they overlap. A plane that is mirrored against those of training is
    flipped for the network, and the result is flipped back. A mask of fewer slices than `least` is
    extended by repeating its last slice. `labels` maps other label numbers to those of
    `organs.ORGANS`; `body` is the label of the body outside organs, if the mask has it. `parts`
    names what is done as published (`PARTS`). Raises ConditionError if the masks do not fit each
    other or the palette. A mask with slices along another axis is turned first, through a file.
    """

    remarks: tuple[str, ...] = ()

    def __init__(
        self,
        organs: Reader,
        disease: Sequence[DiseaseMask],
        masks: Masks,
        plane: tuple[int, int],
        *,
        least: int = 1,
        labels: Mapping[int, int] | None = None,
        body: int | None = None,
        parts: Collection[str] = (),
    ) -> None:
        self.path, self.native = organs.path, organs.geometry
        self.turn = turn_to(self.native.orientation, masks.orientation, self.path)
        self.mask = self.turn.geometry(self.native) if self.turn else self.native
        self._upright = Upright(self._combined, self.native.shape, self.turn, np.int16)
        self.drawn: bool = getattr(organs, "drawn", False)
        self._organs, self._masks = organs, masks
        self._disease: list[Findings] = [*disease]
        self.added: Remembered | None = None
        x, y, z = self.mask.shape
        across, down, _ = self.mask.spacing
        mirrored = _mirrored(self.mask.orientation, masks.orientation)
        self.stretched = "stretch" in parts
        kind = Stretched if self.stretched else Fit
        self.fit = kind((x, y), (across, down), plane, mirrored)
        self.geometry = Geometry((*plane, max(z, least)), self.mask.affine)
        self.target = _target(self.mask, self.fit, parts)
        self._labels = dict(labels) if labels is not None else None
        self._hu = {int(label): hu for label, hu in masks.palette.items()}
        self._body, self._body_found = body, False
        _check_body(body, masks, self._hu)

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield painted frames [t, X, Y], float32; see `Reader.slabs`."""
        with contextlib.closing(self.planes(start)) as planes:
            for each in slab_ranges(self.geometry.shape[2], depths, start):
                yield np.stack(
                    [self._paint(plane, self._hu) for plane in islice(planes, len(each))]
                )

    def in_range(self, intensity: Intensity, depth: int, start: int) -> NDArray[np.float32]:
        """Return painted frames in a VAE's range: [1, t, X, Y], every value rounded once."""
        gain = (intensity.model_max - intensity.model_min) / (intensity.hu_max - intensity.hu_min)
        inside = {n: min(max(hu, intensity.hu_min), intensity.hu_max) for n, hu in self._hu.items()}
        table = {
            n: (hu - intensity.hu_min) * gain + intensity.model_min for n, hu in inside.items()
        }
        count = min(depth, self.geometry.shape[2] - start)
        with contextlib.closing(self.planes(start)) as planes:
            return np.stack([self._paint(plane, table) for plane in islice(planes, count)])[None]

    def check_body_found(self) -> None:
        """Raise ConditionError if no slice read so far has the label named as the body's."""
        if self._body is not None and not self._body_found:
            raise ConditionError(
                f"expected the label {self._body} of the body in {self.path}, found none: correct "
                "--body-label"
            )

    @property
    def written(self) -> Geometry:
        """The grid of the file that is written: that of the mask's file, or `target`."""
        return self.native if self.target is self.mask else self.target

    def wrap(self, writer: Writer) -> Writer:
        """Return a writer of frames on `target` for a file on the grid `written`."""
        if self.turn is None or self.target is not self.mask:
            return writer
        return TurningWriter(writer, self.mask.shape, self.turn.inverse)

    @property
    def body_named(self) -> bool:
        """Whether a label of the body outside organs was named."""
        return self._body is not None

    def result(self, frames: HuFrames) -> HuFrames:
        """Bring generated frames [t, X, Y] to the grid of `target`."""
        if self.target is self.mask:
            return self.fit.volume(frames)
        return np.ascontiguousarray(self.fit.unflipped(frames))

    def seen(self, frame: HuFrames) -> HuFrames:
        """Bring a frame [x, y] of the result to the network's plane, nearest neighbour."""
        if self.target is self.mask:
            return self.fit.labels(frame)
        return np.flip(frame, self.fit.mirrored)

    def close(self) -> None:
        """Release the turned mask; files are closed by who opened them."""
        self._upright.close()

    def planes(self, start: int = 0) -> Generator[Labels]:
        """Yield labels [X, Y] on the model's plane from `start` on, then the last one without end.

        Findings have their number plus the palette's offset.
        """
        first = min(start, self.mask.shape[2] - 1)
        plane = np.empty(0, np.int64)
        with contextlib.closing(self._upright.planes(first)) as upright:
            for labels in upright:
                plane = self.fit.labels(labels.astype(np.int64, copy=False))
                yield plane
        while True:
            yield plane

    def _combined(self, first: int) -> Generator[Labels]:
        """Yield labels with findings [x, y] in the order of the file."""
        with contextlib.ExitStack() as stack:
            organs = stack.enter_context(contextlib.closing(self.organs(first)))
            disease = [
                stack.enter_context(contextlib.closing(each.planes(first)))
                for each in self._disease
            ]
            for labels in organs:
                for each in disease:
                    findings = next(each)
                    labels = np.where(findings > 0, findings + self._masks.offset, labels)
                yield labels

    def organs(self, start: int = 0) -> Generator[Labels]:
        """Yield the mask's labels [x, y] in the numbers of `organs.ORGANS`, from `start` on."""
        with contextlib.closing(frames_of(self._organs, start)) as frames:
            for index, frame in enumerate(frames, start):
                yield self._organ_labels(labels_of(frame, index, self.path), index)

    def place(self, lesions: Sequence[Lesion], seed: int) -> LesionMask:
        """Place lesions in the mask, over those in disease masks; raises as `LesionMask`."""
        placed = LesionMask(lesions, self.organs, self.native, self.path, seed)
        self.add(placed)
        return placed

    def add(self, findings: DiseaseMask | LesionMask) -> None:
        """Show further findings, over those that are there."""
        self.added = Remembered(findings)
        self._disease = [*self._disease, self.added]

    def _organ_labels(self, labels: Labels, index: int) -> Labels:
        """Map labels to the numbers of `organs.ORGANS`."""
        present = [int(n) for n in np.unique(labels)]
        self._body_found = self._body_found or self._body in present
        known = {0, self._body, *(ORGANS if self._labels is None else self._labels)}
        unknown = [n for n in present if n not in known]
        if unknown:
            wanted, remedy = "labels that --labels maps", "map them in a JSON file of your own"
            if self._labels is None:
                wanted, remedy = "TotalSegmentator's labels 0 to 117", "map them with --labels FILE"
                remedy += ", or name the body's with --body-label" if self._masks.body else ""
            raise ConditionError(
                f"expected {wanted}, found {', '.join(map(str, unknown[:5]))} in slice {index} of "
                f"{self.path}: {remedy}"
            )
        if self._labels is None:
            return labels
        table = np.zeros(max(present) + 1, np.int64)
        for n in present:
            table[n] = n if n == self._body else self._labels.get(n, 0)
        return table[labels]

    def _paint(self, labels: Labels, gray: Mapping[int, float]) -> NDArray[np.float32]:
        """Replace labels by their gray values."""
        values, indices = np.unique(labels, return_inverse=True)
        missing = [int(n) for n in values if int(n) not in gray]
        if missing:
            raise ConditionError(
                f"expected labels in this generator's palette, found {missing[0]} in "
                f"{self.path}: remove it from the mask, the generator was not trained on it"
            )
        table = np.array([gray[int(n)] for n in values], np.float32)
        return table[indices].reshape(labels.shape)


def _check_body(body: int | None, masks: Masks, palette: Mapping[int, float]) -> None:
    """Raise ConditionError for a label that cannot be that of the body outside organs."""
    if body is None:
        return
    taken = {0, *ORGANS, *(finding.number + masks.offset for finding in masks.findings)}
    free = sorted(palette.keys() - taken)
    if not masks.body or not free:
        raise ConditionError(
            "expected no --body-label with this generator, which saw no such label in training, "
            f"found {body}: leave it out"
        )
    if body not in free:
        raise ConditionError(
            f"expected --body-label from {free[0]} to {free[-1]}, found {body}: number it so in "
            "the mask"
        )


def _target(mask: Geometry, fit: Fit, parts: Collection[str]) -> Geometry:
    """Return the grid of the result: the mask's, or the model's plane in the same place."""
    if "grid" not in parts:
        return mask
    affine = mask.affine if "affine" in parts else fit.grid(mask.affine)
    if fit.plane == mask.shape[:2] and np.array_equal(fit.grid(mask.affine), mask.affine):
        return mask
    return Geometry((*fit.plane, mask.shape[2]), affine, mask.nifti_header)


def read_labels(labels: str | Path) -> dict[int, int]:
    """Return which organ each label number is, in TotalSegmentator's numbers.

    `labels` is a name in `presets.PRESETS`, an nnU-Net `dataset.json`, or a JSON file that maps
    label numbers to TotalSegmentator's names or numbers. Raises ConditionError for anything else.
    """
    path = Path(labels)
    if str(labels).lower() in PRESETS and not path.exists():
        return PRESETS[str(labels).lower()]
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        if is_dataset(content):
            return dataset_labels(content)
        return {int(label): _organ(organ) for label, organ in content.items()}
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConditionError(
            f"expected {', '.join(PRESETS)}, an nnU-Net dataset.json, or JSON like "
            f'{{"3": "liver", "7": 5, "9": 0}} in {path}, found {reason}: write such a file'
        ) from None


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


def _mirrored(actual: str, trained: str) -> tuple[int, ...]:
    """Return the axes of the plane that are mirrored against those of training.

    There are none if training knew no orientation ("").
    """
    return tuple(axis for axis in (0, 1) if trained and actual[axis] != trained[axis])
