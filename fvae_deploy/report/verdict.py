"""A verdict on each organ in plain words, from its numbers by fixed rules.

| level | means |
|---|---|
| good | bias at most 2 HU, RMSE no larger than the noise of the scan, nothing found there |
| care | anything between |
| poor | bias above 10 HU, or RMSE above 3 times the noise |

Where the noise of a scan is not known, 10 HU stand for it.
"""

from __future__ import annotations

import math
from typing import Any

Numbers = dict[str, Any]
LEVELS = ("good", "care", "poor")
SMALL_BIAS, LARGE_BIAS = 2.0, 10.0  # HU
MUCH = 3.0  # times the noise
USUAL_NOISE = 10.0  # HU


def verdicts(scans: list[Numbers], methods: list[str]) -> dict[str, list[Numbers]]:
    """Return for each method the verdict on every organ over all scans."""
    result: dict[str, list[Numbers]] = {}
    for method in methods:
        organs: dict[str, list[Numbers]] = {}
        for scan in scans:
            for one in scan.get("methods", []):
                if one["method"] != method:
                    continue
                for organ in one["organs"]:
                    here = one["structure"]["by_organ"].get(organ["name"], 0)
                    facts = {"noise": scan["noise_hu"], "found": here} | organ
                    organs.setdefault(organ["name"], []).append(facts)
        result[method] = [_verdict(name, rows) for name, rows in organs.items()]
    return result


def _verdict(name: str, rows: list[Numbers]) -> Numbers:
    """Return the verdict on one organ, from its numbers in all scans."""
    voxels = sum(row["voxels"] for row in rows)
    bias = sum(row["bias"] * row["voxels"] for row in rows) / voxels
    worst = max((row["bias"] for row in rows), key=abs)
    rmse = math.sqrt(sum(row["rmse"] ** 2 * row["voxels"] for row in rows) / voxels)
    noises = [row["noise"] for row in rows if row["noise"] is not None]
    noise = sum(noises) / len(noises) if noises else None
    found = sum(row["found"] for row in rows)
    ratio = rmse / (noise or USUAL_NOISE)
    level = "care"
    if abs(worst) > LARGE_BIAS or ratio > MUCH:
        level = "poor"
    elif abs(worst) <= SMALL_BIAS and ratio <= 1 and not found:
        level = "good"
    return {
        "organ": name,
        "level": level,
        "words": " ".join(_words(worst, ratio, found)),
        "scans": len(rows),
        "bias_hu": bias,
        "worst_bias_hu": worst,
        "rmse_hu": rmse,
        "noise_hu": noise,
        "p99_hu": max(row["p99"] for row in rows),
        "found": found,
    }


def _words(bias: float, ratio: float, found: int) -> list[str]:
    words = []
    if abs(bias) <= SMALL_BIAS:
        words.append("Mean HU are kept.")
    elif abs(bias) <= LARGE_BIAS:
        words.append("Mean HU shift a little: do not compare small differences of density.")
    else:
        words.append("Mean HU are shifted: do not measure density.")
    if ratio <= 1:
        words.append("Errors hide in the noise of the scan.")
    elif ratio <= MUCH:
        words.append("Errors are larger than the noise of the scan.")
    else:
        words.append("Errors are far larger than the noise of the scan: edges or detail are lost.")
    if found == 1:
        words.append("One place has structure that was invented or lost.")
    elif found:
        words.append(f"{found} places have structure that was invented or lost.")
    else:
        words.append("No structure was found to be invented or lost.")
    return words
