"""`fvae export`: weights to bundle, with parity and memory measured in every engine here."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from fvae_deploy import __version__
from fvae_deploy.bench import measure
from fvae_deploy.engines.base import missing, open_engine, precisions
from fvae_deploy.errors import BundleError
from fvae_deploy.export.check import parity
from fvae_deploy.export.manifest import Manifest, Memory, Parity
from fvae_deploy.export.sources import load_model
from fvae_deploy.export.to_onnx import export_bundle

MEASURED = ("openvino", "onnxruntime", "torch")
SIZES = (32, 64)  # latent cells a side, for the two points of the memory line


def make_bundle(
    weights: Path,
    folder: Path,
    *,
    name: str | None = None,
    channels: str = "gray",
    opset: int = 18,
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Export weights to a new bundle and measure it in every engine that runs here.

    Raises BundleError for weights or a folder that do not fit; on failure no folder is left.
    """
    if channels not in ("gray", "rgb"):
        raise BundleError(f"expected channels gray or rgb, found {channels!r}")
    progress("loading weights")
    model, source, metadata = load_model(weights)
    progress("exporting four graphs")
    manifest = export_bundle(
        model,
        folder,
        name=name or weights.stem,
        description=str(metadata.get("description", "LeanVAE")),
        licence=str(metadata.get("licence", "see the source of the weights")),
        source=source,
        version=__version__,
        channels=1 if channels == "gray" else model.config.in_channels,
        scale=metadata.get("latent_scale"),
        opset=opset,
    )
    try:
        return measure_bundle(folder, manifest, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def measure_bundle(
    folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda message: None
) -> Manifest:
    """Measure parity with float32 torch and the memory line, and write them to the manifest."""
    errors: list[Parity] = []
    lines: list[Memory] = []
    reference = open_engine(folder, manifest, "torch")
    names = [name for name in MEASURED if missing(name) is None]
    for engine, precision in ((name, p) for name in names for p in precisions(name)):
        opened = open_engine(folder, manifest, engine, "cpu", precision)
        progress(f"parity of {engine} {precision}")
        errors.append(parity(reference, opened, manifest))
        opened.close()
        progress(f"memory of {engine} {precision}")
        lines += [_memory_line(folder, engine, precision, d) for d in ("encode", "decode")]
    measured = dataclasses.replace(manifest, parity=tuple(errors), memory=tuple(lines))
    measured.save(folder)
    return measured


def _memory_line(folder: Path, engine: str, precision: str, direction: str) -> Memory:
    """Fit peak = fixed + per_cell * cells through two sizes, each in a fresh process."""
    points = []
    for side in SIZES:
        found = measure(folder, engine, precision, direction, side, repeats=1)
        points.append((side * side, int(found["peak_bytes"])))
    (small, low), (large, high) = points
    per_cell = max(1, -(-(high - low) // (large - small)))
    return Memory(engine, precision, direction, max(0, low - per_cell * small), per_cell)
