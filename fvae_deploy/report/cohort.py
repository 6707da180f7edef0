"""Mean, deviation and worst case over the scans of a report, method by method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Numbers = dict[str, Any]
# name -> where it stands in the numbers of a method, its unit, and whether less is better
MEASURES: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "bias": (("errors", "bias"), "HU", True),
    "MAE": (("errors", "mae"), "HU", True),
    "RMSE": (("errors", "rmse"), "HU", True),
    "99 % within": (("errors", "percentiles", "99"), "HU", True),
    "largest": (("errors", "max"), "HU", True),
    "PSNR": (("errors", "psnr"), "dB", False),
    "SSIM": (("errors", "ssim"), "", False),
    "LPIPS": (("errors", "lpips", "lpips"), "", True),
    "invented or lost": (("structure", "found"), "places", True),
    "limits of agreement, lower": (("agreement", "lower"), "HU", True),
    "limits of agreement, upper": (("agreement", "upper"), "HU", True),
    "bits": (("cost", "bits_per_voxel"), "a voxel", True),
}


def value(numbers: Numbers, place: tuple[str, ...]) -> float | None:
    """Return a number of a method, None where it was not measured."""
    found: Any = numbers
    for key in place:
        if not isinstance(found, dict) or found.get(key) is None:
            return None
        found = found[key]
    return float(found)


def summarise(scans: list[Numbers], methods: list[str]) -> dict[str, Any]:
    """Return for each method and measure: scans, mean, standard deviation, worst and its scan."""
    result: dict[str, Any] = {}
    for method in methods:
        rows = [
            (scan["name"], one)
            for scan in scans
            for one in scan.get("methods", [])
            if one["method"] == method
        ]
        result[method] = {
            name: one
            for name, (place, _, less) in MEASURES.items()
            if (one := _statistics([(n, value(r, place)) for n, r in rows], less)) is not None
        }
    return result


def _statistics(values: list[tuple[str, float | None]], less: bool) -> Numbers | None:
    known = [(name, number) for name, number in values if number is not None]
    if not known:
        return None
    numbers = [number for _, number in known]
    mean = math.fsum(numbers) / len(numbers)
    spread = math.fsum((n - mean) ** 2 for n in numbers)
    worse: Callable[[tuple[str, float]], float] = (
        (lambda one: abs(one[1])) if less else (lambda one: -one[1])
    )
    name, number = max(known, key=worse)
    return {
        "scans": len(numbers),
        "mean": mean,
        "deviation": math.sqrt(spread / (len(numbers) - 1)) if len(numbers) > 1 else None,
        "worst": number,
        "worst_scan": name,
    }
