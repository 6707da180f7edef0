"""The chapter of the page on structure that was invented or lost."""

from __future__ import annotations

from typing import Any

from fvae_deploy.report.markup import Markup, join, method_name, note, number, section, tag
from fvae_deploy.report.pictures import Gallery
from fvae_deploy.report.structure import EDGE, LEAST, SIGMAS


def structure(content: dict[str, Any], gallery: Gallery) -> Markup:
    """Return the worst findings of each method with their pictures."""
    methods, parts = content["methods"], []
    several = len(content["scans"]) > 1
    for method in methods:
        total = sum(
            one["structure"]["found"]
            for scan in content["scans"]
            for one in scan.get("methods", [])
            if one["method"] == method
        )
        shown = gallery.get(method, [])
        words = f" – {total} found" + (f", the worst {len(shown)} shown" if shown else "")
        parts.append(tag("h3", method_name(method, methods), words))
        parts += [_finding(rank, one, several) for rank, one in enumerate(shown, start=1)]
    return section(
        "structure",
        "Invented or lost structure",
        "Errors that stand out from the errors around them, the worst first: a lesion that was "
        "erased, or one that was never there. Pictures show original, reconstruction and error "
        "(±100 HU), 44 mm wide.",
        *parts,
        note(
            f"Errors are smoothed by 1.5 mm. What exceeds {LEAST:g} HU and {SIGMAS:g} sigmas of "
            "the errors 5 to 12 mm around it, at least the noise of the scan, is listed, unless "
            f"an edge that moves by {EDGE:g} voxels explains it. Findings outside the body come "
            "last."
        ),
    )


def _finding(rank: int, one: dict[str, Any], several: bool) -> Markup:
    facts = one["facts"]
    picture = tag("img", src=one["picture"], alt=f"finding {rank}")
    x, y, z = facts["voxel"]
    where = ", ".join(f"{mm:.0f}" for mm in facts["position_mm"])
    kind = tag("b", facts["kind"], class_="bad" if facts["kind"] == "invented" else "care")
    scan = f" of {one['scan']}" if several else ""
    return tag(
        "div",
        picture,
        tag(
            "div",
            tag("p", f"{rank}. ", kind, join(" in ", tag("b", facts["organ"]), scan)),
            tag(
                "p",
                f"{facts['sigmas']:.1f} sigmas, {facts['diameter_mm']:.1f} mm across "
                f"({facts['volume_mm3']:.0f} mm³)",
            ),
            tag(
                "p",
                f"against its surroundings {number(facts['contrast_before_hu'], 0, True)} HU in "
                f"the original, {number(facts['contrast_after_hu'], 0, True)} HU after",
            ),
            tag("p", f"voxel {x}, {y}, {z}; at {where} mm (RAS)", class_="note"),
        ),
        class_="finding",
    )
