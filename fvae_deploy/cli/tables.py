"""Tables that the command line prints. rich is imported on use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvae_deploy.errors import printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from fvae_deploy.export.generator import GeneratorManifest
    from fvae_deploy.export.known import KnownModel
    from fvae_deploy.export.manifest import Manifest
    from fvae_deploy.quality.fidelity import Comparison


def parity_table(manifest: Manifest) -> Table:
    """Return the table of the parity that the export measured."""
    from rich.table import Table

    table = Table(title=f"parity of {manifest.name} with float32 torch, measured at export")
    for column in ("engine", "precision", "latent max (deviations)", "mean HU", "max HU"):
        table.add_column(column)
    for row in manifest.parity:
        numbers = (f"{row.latent_max:.1e}", f"{row.hu_mean:.2g}", f"{row.hu_max:.2g}")
        table.add_row(row.engine, row.precision, *numbers)
    return table


def noise_table(manifest: GeneratorManifest) -> Table:
    """Return the table of a generator's parity that the export measured."""
    from rich.table import Table

    table = Table(title=f"one step of {manifest.name} against float32 torch, measured at export")
    for column in ("engine", "precision", "mean error (deviations)", "max error"):
        table.add_column(column)
    for row in manifest.parity:
        table.add_row(row.engine, row.precision, f"{row.mean:.1e}", f"{row.max:.1e}")
    return table


def models_table(known: Iterable[KnownModel]) -> Table:
    """Return the table of the published models that fvae knows."""
    from rich.table import Table

    table = Table(title="published models (hub ids as their authors name them; not downloaded)")
    for column in (
        "name",
        "weights",
        "voxels per cell",
        "channels",
        "input range",
        "window",
        "licence",
    ):
        table.add_column(column, overflow="fold")
    for model in known:
        low, high = model.model_range
        table.add_row(
            model.name,
            model.hub or "in the authors' checkout: docs/any-vae.md",
            f"{model.temporal}x{model.spatial}x{model.spatial}",
            str(model.latent_channels),
            f"{low:g} to {high:g}",
            str(model.window or "-"),
            model.licence.partition(":")[0],
        )
    return table


def bench_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of a benchmark."""
    from rich.table import Table

    table = Table(title=f"encode and decode, slices of {'x'.join(map(str, rows[0]['slice']))}")
    for column in ("engine", "precision", "slices/s", "GFLOP/s", "ceiling"):
        table.add_column(column)
    memory = ["peak MiB", "GPU MiB"] if any(row["peak_gpu_mib"] for row in rows) else ["peak MiB"]
    for column in (*memory, "× peer", "error z mean, max", "error x mean, max"):
        table.add_column(column)
    for row in rows:
        times, share = row["times_reference"], row["share_of_ceiling"]
        errors = [
            "-"
            if row[f"{direction}_error_max"] is None
            else f"{row[f'{direction}_error_mean']:.1e}, {row[f'{direction}_error_max']:.1e}"
            for direction in ("encode", "decode")
        ]
        table.add_row(
            row["engine"],
            row["precision"],
            f"{row['slices_per_second']:.3g}",
            f"{row['gflop_per_second']:.0f}",
            "-" if share is None else f"{100 * share:.0f} %",
            *(f"{row[key]:.0f}" for key in ("peak_mib", "peak_gpu_mib")[: len(memory)]),
            f"{times:.2f}" if times else "-",
            *errors,
        )
    return table


def scans_table(batch: dict[str, Any], untaken: Iterable[tuple[str, str]] = ()) -> Table:
    """Return the table of the results of a batch, and of what it did not take, with reasons."""
    from rich.table import Table

    counts = f"{batch['done']} done, {batch['skipped']} skipped, {batch['failed']} failed"
    table = Table(title=f"{batch['command']}: {counts} in {batch['seconds']:.1f} s")
    for column in ("scan", "slices", "seconds", "slices/s", "peak MiB", "result"):
        table.add_column(column, overflow="fold")
    for scan in batch["scans"]:
        name = printable(Path(scan["input"]).name)
        if "report" in scan:
            report = scan["report"]
            numbers = (
                report["volume"]["slices"],
                report["seconds"]["total"],
                report["slices_per_second"],
                report["memory"]["peak_rss_bytes"] >> 20,
            )
            table.add_row(name, *(f"{n:.4g}" for n in numbers), "done")
        else:
            table.add_row(name, *4 * ["-"], scan.get("error", "skipped"))
    for path, reason in untaken:
        table.add_row(printable(Path(path).name), *4 * ["-"], reason)
    return table


def series_table(series: list[dict[str, Any]]) -> Table:
    """Return the table of the DICOM series in a folder."""
    from rich.table import Table

    table = Table(title=f"{len(series)} series")
    for column in ("series", "modality", "slices", "size", "spacing in mm", "description"):
        table.add_column(column, overflow="fold")
    for one in series:
        size = "x".join(map(str, one["size"]))
        spacing = " x ".join("?" if mm is None else f"{mm:.4g}" for mm in one["spacing"])
        about = "; ".join(filter(None, (one["description"], one["apart_by"])))
        table.add_row(one["series"], one["modality"], str(one["slices"]), size, spacing, about)
    return table


def comparison_table(comparison: Comparison) -> Group:
    """Return the tables of a comparison: the whole volume, then each organ if there are labels."""
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table

    low, high = comparison.hu_window
    title = f"Reconstruction - original, clipped to [{low:g}, {high:g}] HU"
    whole = Table(title=title, box=SIMPLE, show_header=False)
    whole.add_column(style="bold")
    whole.add_column()
    size = " x ".join(map(str, comparison.shape))
    spacing = " x ".join(f"{mm:.3g}" for mm in comparison.spacing)
    similarity = "not measured" if comparison.ssim is None else f"{comparison.ssim:.5f}"
    for name, value in (
        ("volume", f"{size} voxels of {spacing} mm"),
        ("PSNR", f"{comparison.psnr:.2f} dB"),
        ("SSIM", similarity),
        ("MAE", f"{comparison.mae:.3f} HU"),
        ("RMSE", f"{comparison.rmse:.3f} HU"),
        ("99 % within", f"{comparison.p99} HU"),
        ("largest", f"{comparison.max:g} HU"),
        ("bias", f"{comparison.bias:+.3f} HU"),
        ("clipped", f"{comparison.clipped:.3%} of the original's voxels"),
    ):
        whole.add_row(name, value)
    if not comparison.organs:
        return Group(whole)
    organs = Table(title="By organ, in HU; PSNR in dB", box=SIMPLE)
    organs.add_column("organ", no_wrap=True)
    for name in ("voxels", "PSNR", "MAE", "99 %", "max", "bias"):
        organs.add_column(name, justify="right")
    for organ in comparison.organs:
        organs.add_row(
            organ.name.replace("_", " "),
            f"{organ.voxels:,}",
            f"{organ.psnr:.2f}",
            f"{organ.mae:.2f}",
            f"{organ.p99}",
            f"{organ.max:.0f}",
            f"{organ.bias:+.2f}",
        )
    return Group(whole, organs)


def report_table(content: dict[str, Any]) -> Table:
    """Return the table of a report: mean, deviation and worst case of every method."""
    from rich.table import Table

    from fvae_deploy.report.cohort import MEASURES

    count = len(content["scans"])
    table = Table(title=f"{count} scan{'s' * (count != 1)}, reconstruction - original")
    for column in ("method", "measure", "scans", "mean", "deviation", "worst", "of"):
        table.add_column(column, overflow="fold")
    for method, measures in content["cohort"].items():
        for name, found in measures.items():
            deviation = "-" if found["deviation"] is None else f"{found['deviation']:.4g}"
            numbers = (f"{found['mean']:.5g}", deviation, f"{found['worst']:.5g}")
            label = f"{name}, {unit}" if (unit := MEASURES[name][1]) else name
            table.add_row(method, label, str(found["scans"]), *numbers, found["worst_scan"])
    return table


def score_table(content: dict[str, Any]) -> Table:
    """Return the table of a score: the rows that stand for whole metrics."""
    from rich.table import Table

    sizes = f"{len(content['generated'])} generated CTs against {len(content['real'])} real ones"
    table = Table(title=sizes)
    for column in ("metric", "value", "95 % interval", "real CTs", "better"):
        table.add_column(column, overflow="fold")
    for row in content["metrics"]:
        if not row["part"]:
            ends = (row["low"], row["high"])
            interval = "-" if None in ends else f"{ends[0]:.3g} to {ends[1]:.3g}"
            value = f"{row['value']:.4g} {row['unit']}".strip()
            real = "-" if row["real"] is None else f"{row['real']:.3g}"
            table.add_row(row["metric"], value, interval, real, row["better"])
    return table
