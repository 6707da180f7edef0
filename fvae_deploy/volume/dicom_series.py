"""The series among DICOM images, and the choice of one.

Some scanners store several volumes under one SeriesInstanceUID: phases, acquisitions, or planes of
other orientations. They are told apart only where they cannot be one volume, since a helical scan
may count an acquisition for every slice. Such parts are called UID#1, UID#2 and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.dicom_header import Image, image_type, one_line

_KEYS = (  # elements that may tell parts of a series apart, the likeliest first
    "TemporalPositionIdentifier AcquisitionNumber ImageType StackID ConvolutionKernel KVP "
    "AcquisitionTime ContentTime"
)
_ORDERS = ("AcquisitionTime", "ContentTime", "InstanceNumber")
_LISTED = 8  # series in an error message

_Group = list[Image]


@dataclass(frozen=True)
class Series:
    """The slices of one volume, and what tells it from others with its SeriesInstanceUID."""

    uid: str
    images: list[Image]
    number: int | None = None  # of this part, from 1; None if the UID has only one
    trait: str = ""
    expected: str = "one series"  # what several parts show to be wrong

    @property
    def name(self) -> str:
        """The SeriesInstanceUID, with # and a number if the series has several parts."""
        return self.uid if self.number is None else f"{self.uid}#{self.number}"

    @property
    def modality(self) -> str:
        """The modality of the first image."""
        return one_line(self.images[0].values.get("Modality") or "unknown")

    @property
    def description(self) -> str:
        """SeriesDescription."""
        return one_line(self.images[0].values.get("SeriesDescription", ""))

    def facts(self) -> dict[str, Any]:
        """Return what a list of series shows, JSON-ready; lengths in mm, None if unknown."""
        between = _floats(self.images[0], "PixelSpacing")
        depths = sorted(_depths(self.images) or [])
        gap = float(np.median(np.diff(depths))) if len(depths) > 1 else None
        size = [self.images[0].values.get(name) for name in ("Columns", "Rows")]
        return {
            "series": self.name,
            "modality": self.modality,
            "slices": len(self.images),
            "size": size,
            "spacing": [*(reversed(between) if between else (None, None)), gap],
            "description": self.description,
            "apart_by": self.trait.partition(", ")[2],
        }

    def in_short(self) -> str:
        """Return a few words on the series, for messages."""
        facts = [f"{len(self.images)} {self.modality}", self.trait]
        facts += [self.images[0].name] if len(self.images) == 1 and self.number else []
        name = f"...{one_line(self.name[-14:])} {self.description}".rstrip()
        return f"{name} ({', '.join(filter(None, facts))})"


def find_series(images: Iterable[Image]) -> list[Series]:
    """Group images by SeriesInstanceUID, and where one has several volumes, tell them apart."""
    groups: dict[str, _Group] = {}
    for image in images:
        groups.setdefault(str(image.values.get("SeriesInstanceUID") or ""), []).append(image)
    found = []
    for uid, group in groups.items():
        planes = _by_plane(group)
        parts = [
            (part, f"{_size(part[0])}{_plane(part[0]) if len(planes) > 1 else ''}{trait}")
            for plane in planes
            for part, trait in _by_volume(plane)
        ]
        if len(parts) == 1:
            found.append(Series(uid, group, trait=parts[0][1]))
            continue
        expected = _differing([plane[0] for plane in planes])
        for number, (part, trait) in enumerate(parts, start=1):
            found.append(Series(uid, part, number, trait, expected))
    return found


def choose(series: list[Series], wanted: str | None, folder: Path) -> Series:
    """Return the one series that is `wanted`, a SeriesInstanceUID or a unique end of it.

    With None, the only one, or the only CT among other modalities. Raises VolumeError, with a
    list of the series, if there is not exactly one.
    """
    if wanted is None:
        chosen = [one for one in series if one.modality == "CT"] or series
    else:
        chosen = [one for one in series if wanted in (one.name, one.uid)]
        chosen = chosen or [one for one in series if one.name.endswith(wanted)]
        chosen = chosen or [one for one in series if one.uid.endswith(wanted)]
    if len(chosen) != 1:
        shown = chosen or series
        listing = "; ".join(one.in_short() for one in shown[:_LISTED])
        more = f"; and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
        alone = chosen and len({one.uid for one in chosen}) == 1
        raise VolumeError(
            f"expected {chosen[0].expected if alone else 'one series'}, found "
            f"{len(chosen) or 'none'} "
            f"{'to choose from' if wanted is None else f'ending in {wanted}'} in {folder}: "
            f"{listing}{more}: choose one with --series; --list shows all"
        )
    return chosen[0]


def numbering_remarks(series: Series, beside: Iterable[Image]) -> tuple[str, ...]:
    """Return remarks on slices that the headers count and that are not there.

    `beside` are the other images of the same SeriesInstanceUID, which share its numbers. A gap
    between two slices is an error elsewhere; slices missing at an end show only here.
    """
    everything = [*series.images, *beside]
    remarks = []
    numbers = {n for i in everything if (n := _whole(i, "InstanceNumber")) is not None}
    if numbers and len(numbers) == len(everything):
        first, last, count = min(numbers), max(numbers), len(numbers)
        start = 1 if 1 < first <= count + 1 else first
        missing = sorted(set(range(start, last + 1)) - numbers) if last - start < 3 * count else []
        if missing and len(missing) < count:
            shown = ", ".join(map(str, missing[:5])) + (" and others" if len(missing) > 5 else "")
            remarks.append(
                f"InstanceNumber {shown} is missing from the series, whose numbers go from "
                f"{first} to {last}: slices may be missing at an end."
            )
    for name in ("ImagesInAcquisition", "NumberOfSlices", "NumberOfSeriesRelatedInstances"):
        promised = {_whole(image, name) for image in series.images}
        acquisitions = {_whole(image, "AcquisitionNumber") for image in series.images}
        several = name == "ImagesInAcquisition" and len(acquisitions) > 1
        count = len(everything if name == "NumberOfSeriesRelatedInstances" else series.images)
        if len(promised) == 1 and not several and (said := promised.pop()) and said > count:
            remarks.append(
                f"{name} says {said}, but {count} slices are there: slices may be missing at an "
                "end."
            )
    return tuple(remarks)


def _whole(image: Image, name: str) -> int | None:
    try:
        return int(image.values[name])
    except (KeyError, TypeError, ValueError):
        return None


def _by_plane(images: _Group) -> list[_Group]:
    """Group images by size, pixel spacing and orientation, where these clearly differ."""
    groups: list[tuple[Any, _Group]] = []
    for image in images:
        plane = [_floats(image, name) for name in ("ImageOrientationPatient", "PixelSpacing")]
        size = tuple(image.values.get(name) for name in ("Rows", "Columns"))
        for (other_size, other), group in groups:
            if size == other_size and all(map(_alike, plane, other)):
                group.append(image)
                break
        else:
            groups.append(((size, plane), [image]))
    return [group for _, group in groups]


def _differing(planes: _Group) -> str:
    """Return what all slices should share, from one image of each plane."""
    for name, keys in (
        ("size", ("Rows", "Columns")),
        ("pixel spacing", ("PixelSpacing",)),
        ("orientation", ("ImageOrientationPatient",)),
    ):
        values = [
            [_floats(image, key) or image.values.get(key) for key in keys] for image in planes
        ]
        if any(value != values[0] for value in values):
            return f"the same {name} in all slices"
    return "one slice at each position"


def _alike(one: list[float] | None, two: list[float] | None) -> bool:
    """Return whether two header values differ by rounding at most, or one is not there."""
    if one is None or two is None:
        return True
    return len(one) == len(two) and bool(np.allclose(one, two, 0.02, 0.02))


def _by_volume(images: _Group) -> list[tuple[_Group, str]]:
    """Split images of one plane into volumes if some share a position; with the trait of each."""
    depths = _depths(images)
    if depths is None or not _collide(depths):
        return [(images, "")]
    depth = dict(zip(map(id, images), depths, strict=True))

    def apart(parts: list[_Group]) -> bool:
        each = [[depth[id(image)] for image in part] for part in parts]
        smallest = min(map(len, each))
        return (
            len(parts) > 1
            and (smallest > 1 or len(set(depths)) == 1)
            and not any(map(_collide, each))
        )

    for keys in [*combinations(_KEYS.split(), 1), *combinations(_KEYS.split(), 2)]:
        groups: dict[str, _Group] = {}
        for image in images:
            trait = ", ".join(f"{key} {_shown(image, key)}" for key in keys)
            groups.setdefault(trait, []).append(image)
        if apart([*groups.values()]):
            return [(part, f", {trait}") for trait, part in groups.items()]
    for key in _ORDERS:
        if any(key not in image.values for image in images):
            continue
        parts = _in_turns(images, key, lambda image: depth[id(image)])
        if apart(parts) and len({tuple(sorted(depth[id(i)] for i in p)) for p in parts}) == 1:
            return [(part, f", {key} from {_shown(part[0], key)}") for part in parts]
    return [(images, "")]


def _in_turns(images: _Group, key: str, depth: Callable[[Image], float]) -> list[_Group]:
    """Split images in the order of `key`: a new part begins where a position comes again."""
    parts: list[_Group] = []
    here: set[float] = set()
    for image in sorted(images, key=lambda image: _float(image, key)):
        if not parts or depth(image) in here:
            parts.append([])
            here = set()
        parts[-1].append(image)
        here.add(depth(image))
    return parts


def _depths(images: _Group) -> list[float] | None:
    """Return positions along the normal in mm, to 0.001; None where a header does not say them."""
    positions = [_floats(image, "ImagePositionPatient") for image in images]
    orientation = _floats(images[0], "ImageOrientationPatient")
    if orientation is None or len(orientation) != 6:
        return None
    if any(position is None or len(position) != 3 for position in positions):
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    along: list[float] = (np.array(positions, np.float64) @ normal).round(3).tolist()
    return along


def _collide(depths: Iterable[float]) -> bool:
    return max(Counter(depths).values(), default=0) > 1


def _floats(image: Image, name: str) -> list[float] | None:
    try:
        return [float(value) for value in image.values[name]]
    except (KeyError, TypeError, ValueError):
        return None


def _size(image: Image) -> str:
    return "{}x{}".format(*(image.values.get(name, "?") for name in ("Columns", "Rows")))


def _plane(image: Image) -> str:
    """Return pixel spacing and orientation in words, for parts that may differ in them."""
    spacing = _floats(image, "PixelSpacing") or []
    axes = _floats(image, "ImageOrientationPatient") or []
    normal = np.abs(np.cross(axes[:3], axes[3:])) if len(axes) == 6 else np.zeros(3)
    names = ("sagittal", "coronal", "axial")
    plane = names[int(normal.argmax())] if normal.max() > 0.99 else "oblique"
    return f" of {'x'.join(f'{mm:g}' for mm in reversed(spacing))} mm, {plane}"


def _float(image: Image, name: str) -> float:
    try:
        return float(image.values[name])
    except (KeyError, TypeError, ValueError):
        return 0.0


def _shown(image: Image, key: str) -> str:
    if key == "ImageType":
        return "/".join(image_type(image.values))
    return one_line(image.values.get(key, "none"))
