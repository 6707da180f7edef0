"""The chapter of the page on texture: noise power spectra and transfer functions."""

from __future__ import annotations

from typing import Any

from fvae_deploy.report import charts
from fvae_deploy.report.chapters import colour, judged
from fvae_deploy.report.markup import Markup, method_name, note, number, section, table

Numbers = dict[str, Any]
GREY = "#475467"


def texture(content: Numbers) -> Markup:
    """Return the spectra of noise in each kind of region, and the sharpness of edges."""
    methods = content["methods"]
    kinds = {
        kind: None
        for method in methods
        for _, one in judged(content, method)
        for kind in one["texture"]
    }
    drawn = [_noise_chart(content, kind) for kind in kinds]
    rows = []
    for kind in kinds:
        for method in methods:
            for scan, one in judged(content, method):
                if kind in one["texture"]:
                    rows.append(_noise_row(kind, scan, one, methods))
    head = ["region", "scan", "method", "squares", "noise before", "after", "kept",
            "mean frequency before", "after"]  # fmt: skip
    body: list[Any] = [charts.side_by_side(*drawn, _edge_chart(content))]
    body.append(table(head, rows) if rows else note("No even squares of 30 mm were found."))
    body.append(_edge_table(content))
    return section(
        "texture",
        "Texture and sharpness",
        "A noise power spectrum shows how strong noise is at every fineness: a curve that is lower "
        "at the right has lost fine grain, and the picture looks smoother than the scan. The task "
        "transfer function shows how much of an edge's sharpness is left.",
        *body,
        note(
            "Noise in HU, from the spectra of even squares of 30 mm; frequencies per mm. The "
            "transfer function is measured at the skin, on the contrast of about 1000 HU there. "
            "Air is clipped at the window's lower end in both volumes."
        ),
    )


def radiomics(content: Numbers) -> Markup:
    """Return how stable the features of each class are."""
    methods, rows, reasons = content["methods"], [], set()
    for method in methods:
        for scan, one in judged(content, method):
            found = one["radiomics"]
            if "reason" in found:
                reasons.add(found["reason"])
            for kind in found.get("classes", []):
                rows.append([
                    scan["name"], method_name(method, methods), kind["class"], kind["features"],
                    number(kind["ccc"], 3), number(kind["icc"], 3), f"{kind['stable_share']:.0%}",
                ])  # fmt: skip
    head = ["scan", "method", "class", "features", "CCC", "ICC", "CCC of at least 0.85"]
    body = [table(head, rows)] if rows else []
    return section(
        "radiomics",
        "Radiomics",
        "Features of the same balls of tissue before and after, over several places of a scan. 1 "
        "means that a feature is the same; a feature with a low value must not be compared between "
        "originals and reconstructions.",
        *body,
        *(note(f"Not measured: {reason}.") for reason in sorted(reasons)),
        note(
            "Medians over the features of a class: Lin's concordance (CCC) and intraclass "
            "correlation for absolute agreement, ICC(A,1). Features by MIRP, which follows IBSI, "
            "of balls 16 mm across all over the body, with grey levels of 10 HU."
        ),
    )


def _first(content: Numbers, method: str, key: str, inner: str) -> Numbers | None:
    """Return the first scan's curves of a method."""
    for _, one in judged(content, method):
        found = one[key].get(inner) if inner else one[key]
        if found and "before" in found:
            return dict(found)
    return None


def _noise_chart(content: Numbers, kind: str) -> Markup:
    series: list[charts.Series] = []
    for method in content["methods"]:
        found = _first(content, method, "texture", kind)
        if found is None:
            continue
        x = found["frequency_per_mm"][1:]
        if not series:
            series.append(charts.Series("original", GREY, x, found["before"]["nps"][1:], True))
        series.append(charts.Series(method, colour(content, method), x, found["after"]["nps"][1:]))
    return charts.lines(series, f"{kind}: frequency, 1/mm", "noise power, HU² mm²")


def _edge_chart(content: Numbers) -> Markup:
    series: list[charts.Series] = []
    for method in content["methods"]:
        found = _first(content, method, "edges", "")
        if found is None:
            continue
        x = found["frequency_per_mm"]
        if not series:
            series.append(charts.Series("original", GREY, x, found["before"]["ttf"], True))
        series.append(charts.Series(method, colour(content, method), x, found["after"]["ttf"]))
    return charts.lines(series, "skin: frequency, 1/mm", "transfer function")


def _noise_row(kind: str, scan: Numbers, one: Numbers, methods: list[str]) -> list[Any]:
    found = one["texture"][kind]
    before, after = found["before"], found["after"]
    kept = after["noise_hu"] / before["noise_hu"] if before["noise_hu"] else None
    return [
        kind, scan["name"], method_name(one["method"], methods), found["squares"],
        number(before["noise_hu"]), number(after["noise_hu"]),
        "–" if kept is None else f"{kept:.0%}",
        number(before["mean_frequency_per_mm"], 3), number(after["mean_frequency_per_mm"], 3),
    ]  # fmt: skip


def _edge_table(content: Numbers) -> Markup:
    methods, rows = content["methods"], []
    for method in methods:
        for scan, one in judged(content, method):
            found, name = one["edges"], method_name(method, methods)
            if "reason" in found:
                rows.append([scan["name"], name, found["reason"], "", "", "", ""])
                continue
            cells = [
                number(found[when][f"f{share}_per_mm"], 3)
                for share in (50, 10)
                for when in ("before", "after")
            ]
            rows.append([scan["name"], name, f"{found['points']:,}", *cells])
    head = ["scan", "method", "points of skin", "falls to 50 % before", "after",
            "to 10 % before", "after"]  # fmt: skip
    return table(head, rows, "Transfer function at the skin, frequencies per mm")
