"""The page: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from fvae_deploy.report import chapters, found, outlines, price, seen, spectra
from fvae_deploy.report.markup import Markup, esc, join, method_name, section, tag
from fvae_deploy.report.pictures import Pictures

WINDOWS = (
    ("soft tissue", 40, 400),
    ("lung", -600, 1500),
    ("bone", 400, 1800),
    ("liver", 60, 160),
    ("brain", 35, 80),
)


def page(content: dict[str, Any], pictures: Pictures) -> str:
    """Return the HTML of a report."""
    methods = [method_name(name, content["methods"]) for name in content["methods"]]
    chapters = [part for part in _chapters(content, pictures) if part]
    data = {"pictures": pictures.planes, "blobs": pictures.blobs}
    return document(content, "Reconstruction report", _title(content), methods, chapters, data)


def document(
    content: dict[str, Any],
    kind: str,
    title: str,
    methods: Sequence[Markup],
    chapters: Sequence[Markup],
    data: dict[str, Any],
) -> str:
    """Return a page of sections under a header, with its style, script and data in it.

    `methods` are the names, in their colours, of what is compared.
    """
    header = tag(
        "header",
        tag("p", kind, class_="kind"),
        tag("h1", title),
        tag("p", *methods, class_="methods"),
        tag("nav", class_="contents"),
    )
    footer = tag("footer", f"Made by fvae {content['fvae']}. Every number is also in the JSON file "
                 "of the same name.")  # fmt: skip
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    own = files("fvae_deploy.report").joinpath("page")
    style, code = (own.joinpath(n).read_text(encoding="utf-8") for n in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{esc(title)}</title><style>{style}</style></head><body>"
        f"{join(header, *chapters, footer)}"
        f'<script type="application/json" id="data">{script}</script>'
        f"<script>{code}</script></body></html>\n"
    )


def _chapters(content: dict[str, Any], pictures: Pictures) -> list[Markup]:
    if not content["methods"]:
        return [chapters.scans(content)]
    return [
        chapters.summary(content),
        chapters.verdicts(content),
        _viewer(pictures.planes),
        chapters.errors(content),
        chapters.organs(content),
        found.structure(content, pictures.gallery),
        outlines.surfaces(content),
        seen.low_contrast(content),
        spectra.texture(content),
        spectra.radiomics(content),
        price.seams(content),
        price.cost(content),
        chapters.scans(content),
    ]


def _title(content: dict[str, Any]) -> str:
    scans = content["scans"]
    return scans[0]["name"] if len(scans) == 1 else f"{len(scans)} scans"


def _viewer(pictures: list[dict[str, Any]]) -> Markup:
    """Return the frame of the pictures; the script fills it."""
    buttons = [
        tag("button", name, data_level=level, data_width=width, type="button")
        for name, level, width in WINDOWS
    ]
    choices = [
        tag("option", f"{one['method']} – {one['scan']}", value=number)
        for number, one in enumerate(pictures)
    ]
    slider = Markup('<input id="wipe" type="range" min="0" max="2" step="0.01" value="1.5">')
    places = Markup('<input id="place" type="range" min="0" max="0" step="1" value="0">')
    level = Markup('<input id="level" type="number" step="10">')
    width = Markup('<input id="width" type="number" step="10" min="1">')
    reach = Markup('<input id="reach" type="number" step="10" min="1" value="100">')
    return section(
        "pictures",
        "Pictures",
        "Move the slider: from the original to the reconstruction, then to their difference. The "
        "line moves through all three planes together. Of several scans, the one with the largest "
        "mean error is shown.",
        tag(
            "div",
            tag("div", tag("label", "Scan ", tag("select", *choices, id="which")),
                tag("label", "Position ", places), class_="row"),
            tag("div", *buttons, tag("label", "level ", level), tag("label", "width ", width),
                tag("label", "error ± ", reach), class_="row"),
            tag("div", tag("span", "original"), slider, tag("span", "reconstruction", class_="mid"),
                tag("span", "error"), class_="wipe"),
            tag("div", id="planes", class_="planes"),
            class_="viewer",
        ),
    )  # fmt: skip
