"""Chapters of the page on errors in HU: the summary, the whole scan, organs, and the scans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvae_deploy.report import charts
from fvae_deploy.report.cohort import MEASURES
from fvae_deploy.report.hounsfield import bland_altman
from fvae_deploy.report.markup import (
    COLOURS,
    Markup,
    method_name,
    note,
    number,
    section,
    table,
    tag,
)

Content = dict[str, Any]


def judged(content: Content, method: str) -> Iterator[tuple[Content, Content]]:
    """Yield the scans that a method was judged on, with the method's numbers."""
    for scan in content["scans"]:
        for one in scan.get("methods", []):
            if one["method"] == method:
                yield scan, one


def colour(content: Content, method: str) -> str:
    """Return the colour of a method."""
    return COLOURS[content["methods"].index(method) % len(COLOURS)]


def summary(content: Content) -> Markup:
    """Return the numbers for a paper: mean, deviation and worst case of each method."""
    methods, several = content["methods"], len(content["scans"]) > 1
    rows = []
    for name, (_, unit, _) in MEASURES.items():
        cells: list[Any] = [f"{name}, {unit}" if unit else name]
        for method in methods:
            found = content["cohort"][method].get(name)
            cells.append(_statistic(found, several, 4 if name == "SSIM" else 2))
        if set(cells[1:]) != {"–"}:
            rows.append(cells)
    head = ["", *(method_name(method, methods) for method in methods)]
    lead = "All numbers compare the reconstruction with the original. "
    lead += (
        "Mean ± standard deviation over the scans; the worst scan in brackets."
        if several
        else "They are for this one scan."
    )
    return section("summary", "Summary", lead, table(head, rows))


def _statistic(found: Content | None, several: bool, digits: int) -> str:
    if found is None:
        return "–"
    if not several:
        return number(found["mean"], digits)
    spread = f" ± {number(found['deviation'], digits)}" if found["deviation"] is not None else ""
    worst = f" ({number(found['worst'], digits)}: {found['worst_scan']})"
    return number(found["mean"], digits) + spread + worst


def verdicts(content: Content) -> Markup:
    """Return the verdict on each organ with the numbers behind it."""
    methods, parts = content["methods"], []
    for method in methods:
        parts.append(tag("h3", method_name(method, methods)))
        parts += [_verdict(one) for one in content["verdicts"][method]]
    return section(
        "verdicts",
        "Verdicts",
        "By fixed rules, from the numbers below each line. Good: a bias of at most 2 HU, errors no "
        "larger than the noise of the scan, no structure invented or lost. Poor: a bias above "
        "10 HU, or errors above 3 times the noise. Care: between the two.",
        *parts,
    )


def _verdict(one: Content) -> Markup:
    noise = "unknown" if one["noise_hu"] is None else f"{one['noise_hu']:.1f} HU"
    spread = f", at worst {one['worst_bias_hu']:+.2f}" if one["scans"] > 1 else ""
    colours = {"good": "good", "care": "care", "poor": "bad"}
    return tag(
        "div",
        tag("span", one["level"], class_=f"mark {colours[one['level']]}"),
        tag("span", tag("b", one["organ"]), f": {one['words']}"),
        tag(
            "span",
            f"bias {one['bias_hu']:+.2f} HU{spread}; RMSE {one['rmse_hu']:.1f} HU beside a noise "
            f"of {noise}; 99 % within {one['p99_hu']} HU; {one['found']} found",
            class_="numbers",
        ),
        class_="verdict",
    )


def errors(content: Content) -> Markup:
    """Return the percentiles of errors over whole scans, scan by scan."""
    methods, (low, high) = content["methods"], content["window_hu"]
    head = ["scan", "method", "bias", "MAE", "RMSE", "50 %", "90 %", "95 %", "99 %", "99.9 %",
            "largest", "PSNR, dB", "SSIM", "LPIPS"]  # fmt: skip
    rows, reasons = [], set[str]()
    for method in methods:
        for scan, one in judged(content, method):
            e = one["errors"]
            reasons |= {e["lpips"]["reason"]} if "reason" in e["lpips"] else set()
            shares = [number(value, 0) for value in e["percentiles"].values()]
            rows.append([
                scan["name"], method_name(method, methods), number(e["bias"], 2, True),
                number(e["mae"]), number(e["rmse"]), *shares, number(e["max"], 0),
                "no error" if e["psnr"] is None else number(e["psnr"]), number(e["ssim"], 4),
                number(e["lpips"].get("lpips"), 4),
            ])  # fmt: skip
    return section(
        "errors",
        "Errors in HU",
        "Over all voxels, air around the patient included. Bias is the mean difference, MAE the "
        "mean of its size, RMSE the root of its mean square. 99 % of all voxels are off by no more "
        "than the number below 99 %.",
        table(head, rows),
        *(note(f"LPIPS was not measured: {reason}.") for reason in sorted(reasons)),
        note(
            f"Both volumes are clipped to [{low:g}, {high:g}] HU. PSNR and SSIM have a data range "
            f"of {high - low:g} HU; SSIM is the mean over axial slices of "
            "scikit-image's structural_similarity with its defaults."
        ),
    )


def organs(content: Content) -> Markup:
    """Return errors by organ and the agreement of organ means."""
    methods, parts = content["methods"], []
    for method in methods:
        rows = [
            [
                scan["name"], organ["name"], f"{organ['voxels']:,}",
                number(organ["original_mean"], 1), number(organ["reconstruction_mean"], 1),
                number(organ["bias"], 2, True), number(organ["mae"]), number(organ["rmse"]),
                number(organ["p99"], 0), number(organ["max"], 0),
            ]
            for scan, one in judged(content, method)
            for organ in one["organs"]
        ]  # fmt: skip
        head = ["scan", "organ", "voxels", "mean before", "mean after", "bias", "MAE", "RMSE",
                "99 %", "largest"]  # fmt: skip
        inner = table(head, rows)
        title = tag("summary", method_name(method, methods), f" – {len(rows)} organs")
        parts.append(tag("details", title, inner, open="open" if len(rows) < 30 else None))
    parts.append(charts.side_by_side(*(_agreement(content, method) for method in methods)))
    labels = any(scan.get("labels", "thresholds") != "thresholds" for scan in content["scans"])
    lead = "Inside each organ of the label map. " if labels else (
        "No label map was given, so tissues told apart by thresholds stand for organs: pass "
        "--labels for a label map, or --segment to have TotalSegmentator make one. "
    )  # fmt: skip
    return section(
        "organs",
        "Errors by organ",
        lead + "The charts follow Bland and Altman: each point is the mean HU of one organ of one "
        "scan, and 95 % of the differences are expected between the limits.",
        *parts,
    )


def _agreement(content: Content, method: str) -> Markup:
    """Return the chart of Bland and Altman over all organs of all scans."""
    names, before, after = [], [], []
    for scan, one in judged(content, method):
        for organ in one["organs"]:
            names.append(f"{scan['name']}: {organ['name']}")
            before.append(organ["original_mean"])
            after.append(organ["reconstruction_mean"])
    found = bland_altman(before, after)
    middle = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    off = [b - a for a, b in zip(before, after, strict=True)]
    across = [(0.0, "")]
    if found is not None:
        across = [
            (found["bias"], f"bias {found['bias']:+.2f}"),
            (found["lower"], f"{found['lower']:+.2f}"),
            (found["upper"], f"{found['upper']:+.2f}"),
        ]
    series = [charts.Series(method, colour(content, method), middle, off, labels=names)]
    return charts.points(series, "mean of both, HU", "after - before, HU", across)


def scans(content: Content) -> Markup:
    """Return the list of scans, those that failed with their errors."""
    rows = []
    for scan in content["scans"]:
        if "error" in scan:
            rows.append([scan["name"], tag("span", scan["error"], class_="bad"), "", "", ""])
            continue
        shape = " × ".join(map(str, scan["shape"]))
        spacing = " × ".join(f"{mm:.3g}" for mm in scan["spacing_mm"])
        remarks = " ".join(scan["remarks"])
        rows.append(
            [
                scan["name"],
                f"{shape} voxels of {spacing} mm. {remarks}",
                number(scan["noise_hu"], 1),
                f"{scan['clipped']:.2%}",
                Path(scan["labels"]).name,
            ]
        )
    failed = sum("error" in scan for scan in content["scans"])
    done = len(rows) - failed
    lead = "1 scan was judged" if done == 1 else f"{done} scans were judged"
    lead += f"; {failed} could not be, and passed over." if failed else "."
    head = ["scan", "", "noise, HU", "outside the window", "organs from"]
    return section("scans", "Scans", lead, table(head, rows))
