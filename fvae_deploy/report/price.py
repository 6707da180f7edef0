"""Chapters of the page on seams, and on what a reconstruction costs."""

from __future__ import annotations

from typing import Any

from fvae_deploy.report.chapters import judged
from fvae_deploy.report.markup import Markup, method_name, note, number, section, table

Numbers = dict[str, Any]


def seams(content: Numbers) -> Markup:
    """Return how much the error jumps across borders of the computation."""
    methods, rows = content["methods"], []
    for method in methods:
        for scan, one in judged(content, method):
            for seam in one["seams"]:
                if seam["borders"]:
                    rows.append([
                        scan["name"], method_name(method, methods), seam["border"],
                        seam["borders"], number(seam["across_hu"], 3),
                        number(seam["beside_hu"], 3), number(seam["ratio"], 3),
                    ])  # fmt: skip
    head = ["scan", "method", "border", "how many", "step across, HU", "beside, HU", "ratio"]
    return section(
        "seams",
        "Seams",
        "How much the error changes from one voxel to the next across borders of the computation, "
        "and across the lines beside them. A ratio of 1 means that no seam can be seen.",
        table(head, rows),
        note(
            "A tile border is listed only where the run had several tiles. Windows of 65 slices "
            "are those of the published scripts; a causal run has no borders there."
        ),
    )


def cost(content: Numbers) -> Markup:
    """Return bits, time and memory of each method, beside JPEG-LS."""
    methods, rows, reasons = content["methods"], [], set()
    for method in methods:
        for scan, one in judged(content, method):
            if "cost" not in one:
                continue
            spent, errors = one["cost"], one["errors"]
            jpegls = spent["jpeg_ls"]
            rows.append([
                scan["name"], method_name(method, methods), number(spent["bits_per_voxel"], 3),
                number(errors["mae"]), number(errors["percentiles"]["99"], 0),
                number(errors["max"], 0), number(errors["psnr"]),
                number(spent["seconds"]["encode"], 1), number(spent["seconds"]["decode"], 1),
                number(spent["peak_bytes"] / 2**20, 0), spent["engine"],
            ])  # fmt: skip
            if "reason" in jpegls:
                reasons.add(jpegls["reason"])
                continue
            rows.append([
                scan["name"], f"JPEG-LS, bound {jpegls['bound_hu']} HU",
                number(jpegls["bits_per_voxel"], 3), number(jpegls["mae"]),
                number(jpegls["percentiles"]["99"], 0), number(jpegls["max"], 0),
                "no error" if jpegls["psnr"] is None else number(jpegls["psnr"]),
                "", "", "", "at the same bits",
            ])  # fmt: skip
            rows.append([
                scan["name"], "JPEG-LS, lossless", number(jpegls["lossless_bits_per_voxel"], 3),
                *["0"] * 3, "no error", "", "", "", "",
            ])  # fmt: skip
    if not rows:
        body = note("Reconstructions were given, so what they cost is not known.")
    else:
        head = ["scan", "", "bits a voxel", "MAE, HU", "99 %, HU", "largest, HU", "PSNR, dB",
                "encode, s", "decode, s", "memory, MiB", ""]  # fmt: skip
        body = table(head, rows)
    return section(
        "cost",
        "Cost",
        "What the latents take on disk and how long they took, beside a codec that is made for "
        "pictures: JPEG-LS, with the smallest bound of error that takes no more bits.",
        body,
        *(note(f"JPEG-LS was not measured: {reason}.") for reason in sorted(reasons)),
        note(
            "Bits of the latents as they are stored. Memory is the peak beyond the libraries. "
            "JPEG-LS codes slices one by one, clipped as everything here."
        ),
    )
