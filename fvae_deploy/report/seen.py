"""The chapter of the page on small lesions of low contrast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fvae_deploy.report.lesions import CONTRASTS, DISC, SHAPES, SIZES
from fvae_deploy.report.markup import Markup, join, method_name, note, number, section, table, tag

Numbers = dict[str, Any]
SHADES = ((1.0, "#f8d7d3"), (2.0, "#fdebc8"), (3.3, "#e6f2dd"), (math.inf, "#cfe9d8"))  # of d'


def low_contrast(content: Numbers) -> Markup:
    """Return the maps of detectability, size by contrast, of each method and shape."""
    methods, parts = content["methods"], []
    for method in methods:
        measured = [one for one in _all(content, method) if "conditions" in one]
        reasons = {one["reason"] for one in _all(content, method) if "reason" in one}
        parts.append(tag("h3", method_name(method, methods)))
        if measured:
            maps = [_map(measured, shape) for shape in SHAPES]
            parts.append(tag("div", *maps, class_="charts"))
        for reason in sorted(reasons):
            parts.append(note(f"Not measured: {reason}."))
        if not measured and not reasons:
            parts.append(note("Not measured: this needs a model, to reconstruct test lesions."))
    return section(
        "low-contrast",
        "Low contrast",
        "Test lesions were put into even soft tissue of the original, and looked for again after "
        "reconstruction. Each cell gives the observer's d' before → after, and how much of the "
        "contrast is kept. With d' of 1 an observer who chooses between two places is right in "
        "76 % of all cases, with 2 in 92 %, with 3.3 in 99 %.",
        *parts,
        note(
            "A channelised Hotelling observer with four Laguerre-Gauss channels, which knows size "
            f"and place. Balls, and discs {DISC:g} mm high along z; HU above the surroundings."
        ),
    )


def _all(content: Numbers, method: str) -> Iterator[Numbers]:
    for scan in content["scans"]:
        for one in scan.get("methods", []):
            if one["method"] == method and "low_contrast" in one:
                yield one["low_contrast"]


def _map(measured: list[Numbers], shape: str) -> Markup:
    """Return the map of one shape, averaged over the scans."""
    rows = []
    for size in SIZES:
        cells: list[Any] = [f"{size:g} mm"]
        for contrast in CONTRASTS:
            cells.append(_cell(_condition(measured, shape, size, contrast)))
        rows.append(cells)
    head = [shape, *(f"{contrast:g} HU" for contrast in CONTRASTS)]
    return tag("div", table(head, rows), class_="heat")


def _condition(measured: list[Numbers], shape: str, size: float, contrast: float) -> list[Numbers]:
    wanted = {"shape": shape, "size_mm": size, "contrast_hu": contrast}
    return [
        row
        for one in measured
        for row in one["conditions"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def _cell(rows: list[Numbers]) -> Markup:
    known = [row for row in rows if row["after"]["d_prime"] is not None]
    if not known:
        return Markup("–")
    before, after = (sum(r[w]["d_prime"] for r in known) / len(known) for w in ("before", "after"))
    contrast = [sum(r[w]["contrast_hu"] for r in known) for w in ("before", "after")]
    kept = contrast[1] / contrast[0] if contrast[0] else 0
    shade = next(colour for most, colour in SHADES if after < most)
    text = join(number(before, 1), " → ", tag("b", number(after, 1)), Markup("<br>"), f"{kept:.0%}")
    return tag("div", text, style=f"background:{shade}", class_="cell")
