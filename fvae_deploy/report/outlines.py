"""The chapter of the page on surfaces of segmentations."""

from __future__ import annotations

from typing import Any

from fvae_deploy.report.chapters import judged
from fvae_deploy.report.markup import Markup, join, method_name, note, number, section, table, tag

Numbers = dict[str, Any]


def surfaces(content: Numbers) -> Markup:
    """Return Dice, NSD and HD95 of each surface, with the segmenter's own repeatability."""
    methods, rows = content["methods"], []
    for method in methods:
        for scan, one in judged(content, method):
            for surface in one["surfaces"]:
                after, again = surface["after"], surface["again"]
                name = join(surface["name"], tag("small", f" {surface['segmenter']}"))
                cells: list[Any] = [scan["name"], method_name(method, methods), name]
                for key, digits in (("dice", 4), ("nsd_1mm", 4), ("nsd_2mm", 4)):
                    cells.append(_beside(after[key], again and again[key], digits))
                cells.append(_beside_distance(after, again))
                rows.append(cells)
    head = ["scan", "method", "surface", "Dice", "NSD at 1 mm", "NSD at 2 mm", "HD95, mm"]
    return section(
        "surfaces",
        "Surfaces of segmentations",
        "Both volumes are segmented in the same way, and the outlines compared. In brackets: the "
        "same for the original with fresh noise of the strength that the scan has, which is how "
        "well the segmenter repeats itself. A reconstruction need not be better than that.",
        table(head, rows),
        note(
            "NSD: the share of both surfaces that lie within 1 or 2 mm of the other one. HD95: "
            "95 % of each surface is no farther from the other. Definitions as in MONAI. "
            "Thresholds tell body, air and bone apart; label maps are those that were given, or "
            "TotalSegmentator's."
        ),
    )


def _beside(after: float, again: float | None, digits: int) -> str:
    return number(after, digits) + (f" ({number(again, digits)})" if again is not None else "")


def _beside_distance(after: Numbers, again: Numbers | None) -> str:
    texts = []
    for one in (after, again):
        if one is not None:
            known = one["hd95_mm"]
            far = f"> {one['distances_known_to_mm']:g}"
            texts.append(far if known is None else number(known))
    return texts[0] + (f" ({texts[1]})" if len(texts) > 1 else "")
