"""The page of a score: all rows in tables, charts, and pictures of both sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fvae_deploy.report import charts
from fvae_deploy.report.markup import (
    COLOURS,
    Markup,
    join,
    method_name,
    note,
    number,
    section,
    table,
    tag,
)
from fvae_deploy.report.page import document
from fvae_deploy.score.examine import Seen
from fvae_deploy.score.pictures import pair, sheet

Content = dict[str, Any]
SETS = ("real", "generated")
HEAD = ["", "value", "95 % interval", "real CTs", "better", "cases"]
BETTER = {"lower": "lower", "higher": "higher", "0": "nearer to 0", "1": "nearer to 1"}


def page(content: Content, real: Sequence[Seen], generated: Sequence[Seen]) -> str:
    """Return the HTML of a score."""
    title = f"{len(generated)} generated CTs against {len(real)} real ones"
    chapters = [
        _summary(content),
        _pictures(real, generated),
        _parts(content, "features", "Distances of features", "By plane.",
               ("Fréchet", "kernel", "FID", "KID", "FVD")),
        _hounsfield(content),
        _parts(content, "adherence", "Mask adherence", "By organ or class of the mask.",
               ("mask adherence",)),
        _nearest(content, real, generated),
        _parts(content, "findings", "Findings", "By finding, of CTs in the table of texts.",
               ("AUC",)),
        _cases(content),
    ]  # fmt: skip
    shown = [part for part in chapters if part]
    names = [method_name(name, SETS) for name in SETS]
    return document(content, "Score of generated CTs", title, names, shown, {"pictures": []})


def shown_number(value: float | None) -> str:
    """Return a number with about three digits."""
    if value is None:
        return "–"
    return number(value, 3 if abs(value) < 10 else 1)


def interval(row: Content) -> str:
    """Return the interval of a row as text."""
    if row["low"] is None:
        return "–"
    return f"{shown_number(row['low'])} to {shown_number(row['high'])}"


def _rows(rows: Iterable[Content], by_part: bool) -> list[list[Any]]:
    return [
        [
            row["part"] if by_part and row["part"] else row["metric"],
            f"{shown_number(row['value'])} {row['unit']}".strip(),
            interval(row),
            shown_number(row["real"]),
            BETTER[row["better"]],
            f"{row['generated_cases']} / {row['real_cases']}",
        ]
        for row in rows
    ]


def _summary(content: Content) -> Markup:
    rows = [row for row in content["metrics"] if not row["part"]]
    spacing = " x ".join(f"{mm:.3g}" for mm in content["spacing_mm"])
    return section(
        "summary",
        "Summary",
        "Under real CTs stands what real CTs score themselves: for distances, one half of them "
        "against the other, which is about what a perfect generator would score with half the "
        "cases. Two values differ only if their intervals do not overlap much.",
        table(HEAD, _rows(rows, by_part=False)),
        *(note(text) for text in content["remarks"]),
        note("Not measured: " + " ".join(content["left_out"])) if content["left_out"] else "",
        note(
            f"Common grid: {spacing} mm, axes L, P, S. Intervals are of "
            f"{content['bootstrap']['rounds']} bootstrap draws of cases, centred on the value."
        ),
        *(note(_network(kind, one)) for kind, one in content["networks"].items()),
    )


def _network(kind: str, one: Content) -> str:
    digest = f", SHA-256 {one['sha256']}" if one.get("sha256") else ""
    return f"Network of {kind}: {one['name']}{digest}."


def _pictures(real: Sequence[Seen], generated: Sequence[Seen]) -> Markup:
    parts = []
    for name, side in zip(SETS, (real, generated), strict=True):
        parts.append(tag("h3", method_name(name, SETS)))
        style = "max-width:100%"
        parts.append(tag("img", src=sheet(side), alt=f"{name} CTs", style=style))
    return section(
        "pictures",
        "Pictures",
        "The middle axial and coronal slice of the first CTs of each set, level 40 HU, width 400.",
        *parts,
    )


def _parts(content: Content, name: str, title: str, lead: str, metrics: tuple[str, ...]) -> Markup:
    """Return a table of each of these metrics by its parts; nothing if there are none."""
    tables: dict[str, list[Content]] = {}
    for row in content["metrics"]:
        if row["part"] and row["metric"].startswith(metrics):
            tables.setdefault(row["metric"], []).append(row)
    if not tables:
        return Markup("")
    inner = [_folded(metric, rows) for metric, rows in tables.items()]
    return section(name, title, lead, *inner)


def _folded(metric: str, rows: Sequence[Content]) -> Markup:
    words = tag("summary", f"{metric} – {len(rows)} rows")
    opened = "open" if len(rows) < 12 else None
    return tag("details", words, table(HEAD, _rows(rows, by_part=True)), open=opened)


def _hounsfield(content: Content) -> Markup:
    rows = [row for row in content["metrics"] if row["metric"].startswith("HU by")]
    if not rows:
        return Markup("")
    tables: dict[str, list[Content]] = {}
    for row in rows:
        if row["part"]:
            tables.setdefault(row["metric"], []).append(row)
    known = [row for row in rows if row["part"] and row["real"] is not None]
    labels = [f"{row['part']}: {row['value']:.1f} HU" for row in known]
    series = charts.Series(
        "", COLOURS[1], [row["real"] for row in known], [row["value"] for row in known],
        labels=labels,
    )  # fmt: skip
    chart = charts.points([series], "real against real, HU", "generated against real, HU")
    return section(
        "hounsfield",
        "HU by organ",
        "The Wasserstein distance is how far the HU of an organ must be moved on average to get "
        "the real distribution. Each case counts the same.",
        charts.side_by_side(chart) if known else "",
        *(_folded(metric, parts) for metric, parts in tables.items()),
    )


def _nearest(content: Content, real: Sequence[Seen], generated: Sequence[Seen]) -> Markup:
    found = content["nearest"]
    series = [
        charts.Series(words, colour, found[key]["distance_hu"], found[key]["share"])
        for words, colour, key in (
            ("real to the nearest other real one", COLOURS[0], "real_to_real"),
            ("generated to the nearest real one", COLOURS[1], "generated_to_real"),
        )
    ]
    sides = [{one.name: one for one in side} for side in (real, generated)]
    pictures = []
    for one in found["pairs"]:
        panels = pair(sides[1][one["generated"]], sides[0][one["real"]])
        images = [tag("img", src=panel, alt="closest pair") for panel in panels]
        words = f"{one['real']} (real) and {one['generated']} (generated)"
        text = tag("p", tag("b", words), f": {one['distance_hu']:.1f} HU apart")
        pictures.append(tag("div", join(*images), text, class_="finding"))
    return section(
        "nearest",
        "Diversity and nearest real CTs",
        "Distances of coarse volumes of 16 x 16 x 16 cells. Generated CTs that lie much nearer to "
        "real ones than these to each other may be copies of training CTs.",
        charts.side_by_side(charts.lines(series, "distance, HU", "share of CTs")),
        tag("h3", "The closest pairs"),
        *pictures,
        note("Real, generated, and their difference (±100 HU); axial, then coronal."),
    )


def _cases(content: Content) -> Markup:
    rows = [
        [one["name"], _grid_words(one), method_name(name, SETS), number(one["noise_hu"], 1)]
        for name in SETS
        for one in content[name]
    ]
    rows += [
        [one["name"], tag("span", one["error"], class_="bad"), "", ""] for one in content["failed"]
    ]
    lead = f"{len(content['failed'])} could not be read." if content["failed"] else "All were read."
    return section("scans", "CTs", lead, table(["CT", "", "set", "noise, HU"], rows))


def _grid_words(one: Content) -> str:
    shape = " × ".join(map(str, one["shape"]))
    spacing = " × ".join(f"{mm:.3g}" for mm in one["spacing_mm"])
    return " ".join([f"{shape} of {spacing} mm.", *one["remarks"]])
