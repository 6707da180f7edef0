"""Puts small lesions into an original and looks for them again after reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fvae_deploy.report import observer
from fvae_deploy.report.lesions import (
    CONTRASTS,
    SHAPES,
    SIZES,
    Part,
    Place,
    Volume,
    plant,
    spots,
)

Through = Callable[[Volume], Volume]  # a part of a scan -> its reconstruction
CONDITIONS = [(size, contrast) for size in SIZES for contrast in CONTRASTS]
PASSES = 2  # for each shape
REACH = 14.0  # mm, half of the square that the observer sees
Lesion = tuple[Place, str, float, float]


def detectability(part: Part, through: Through) -> dict[str, Any]:
    """Return contrast to noise and d' before and after, for each shape, size and contrast.

    `through` reconstructs a part. Too few even places give a reason in place of numbers.
    """
    places = list(part.places)
    if len(places) < observer.FEWEST:
        return {
            "places": len(places),
            "reason": f"{len(places)} of {observer.FEWEST} places needed in even soft tissue",
        }
    plain = {"before": part.hu, "after": through(part.hu)}
    seen: dict[tuple[str, float, float], list[tuple[Place, dict[str, Volume]]]] = {}
    for lesions in _passes(places):
        planted = plant(part, lesions)
        pair = {"before": planted, "after": through(planted)}
        for place, shape, size, contrast in lesions:
            cut = {when: spots(volume, part, [place], REACH) for when, volume in pair.items()}
            seen.setdefault((shape, size, contrast), []).append((place, cut))
    absent = {when: spots(volume, part, places, REACH) for when, volume in plain.items()}
    rows = [
        {"shape": shape, "size_mm": size, "contrast_hu": contrast, "lesions": len(some)}
        | _compare(part, size, some, plain, absent)
        for (shape, size, contrast), some in sorted(seen.items())
    ]
    return {"places": len(places), "conditions": rows}


def _passes(places: list[Place]) -> Iterator[list[Lesion]]:
    """Yield the lesions of each pass: every place holds one, its kind moves from pass to pass."""
    for shape in SHAPES:
        for number in range(PASSES):
            shift = number * len(CONDITIONS) // PASSES
            kinds = [CONDITIONS[(n + shift) % len(CONDITIONS)] for n in range(len(places))]
            yield [(place, shape, *kind) for place, kind in zip(places, kinds, strict=True)]


def _compare(
    part: Part,
    size: float,
    some: list[tuple[Place, dict[str, Volume]]],
    plain: dict[str, Volume],
    absent: dict[str, Volume],
) -> dict[str, Any]:
    """Return the numbers of one condition, before and after."""
    mm = part.spacing[0], part.spacing[1]
    places = [place for place, _ in some]
    result: dict[str, Any] = {}
    for when in ("before", "after"):
        present = np.concatenate([cut[when] for _, cut in some])
        without = spots(plain[when], part, places, REACH)
        contrast, ratio = observer.contrast_to_noise(present, without, mm, size)
        changes = observer.responses(present - without, mm, size)
        found = observer.d_prime(changes, observer.responses(absent[when], mm, size))
        result[when] = {"contrast_hu": contrast, "cnr": ratio, "d_prime": found}
    return result
