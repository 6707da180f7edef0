"""`fvae export`: weights to bundle, with parity and memory measured in every engine here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from fvae_deploy.bench.run import DIRECTIONS
from fvae_deploy.bench.worker import in_process
from fvae_deploy.engines.base import missing, open_engine, precisions
from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.check import noise_parity, parity
from fvae_deploy.export.generator import GeneratorManifest, NoiseParity
from fvae_deploy.export.generators import load_generator
from fvae_deploy.export.manifest import Manifest, Memory, Parity
from fvae_deploy.export.sources import Foreign, load
from fvae_deploy.export.to_onnx import export_bundle, write_bundle
from fvae_deploy.version import __version__

MEASURED = ("openvino", "onnxruntime", "torch")


def make_bundle(
    model: str | Path,
    folder: Path,
    *,
    name: str | None = None,
    channels: str = "gray",
    foreign: Foreign | None = None,
    opset: int = 18,
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Export weights to a new bundle and measure it in every engine that runs here.

    `model` and `foreign` are what `export.sources.load` takes. Raises BundleError for weights
    or a folder that do not fit. The folder appears when all is measured.
    """
    if channels not in ("gray", "rgb"):
        raise BundleError(f"expected channels gray or rgb, found {channels!r}")
    progress("loading weights")
    gray = channels == "gray"
    found = load(str(model), gray=gray, foreign=foreign, progress=progress)
    return export_bundle(
        found.model,
        folder,
        name=name or found.name,
        description=found.description,
        licence=found.licence,
        source=found.source,
        version=__version__,
        opset=opset,
        progress=progress,
        measure=lambda where, manifest: measure_bundle(where, manifest, progress),
    )


def make_generator_bundle(
    weights: Path,
    folder: Path,
    *,
    name: str | None = None,
    config: Path | None = None,
    text: str | None = None,
    opset: int = 18,
    progress: Callable[[str], None] = lambda message: None,
) -> GeneratorManifest:
    """Export a generator to a new bundle and measure one step in every engine that runs here.

    `config` and `text` are what `export.generators.load_generator` takes. Raises BundleError
    for files or a folder that do not fit. The folder appears when all is measured.
    """
    progress("loading weights")
    found = load_generator(
        weights, name=name, config=config, text=text, version=__version__, progress=progress
    )
    return write_bundle(
        found.manifest,
        found.stages,
        folder,
        opset,
        progress,
        texts=found.texts,
        measure=lambda where, manifest: measure_generator(where, manifest, progress),
    )


def measure_generator(
    folder: Path, manifest: GeneratorManifest, progress: Callable[[str], None]
) -> GeneratorManifest:
    """Measure parity of one step with float32 torch; returns the manifest with it."""
    rows: list[NoiseParity] = []
    reference = open_engine(folder, manifest, "torch")
    heavy = manifest.part("denoise").heavy
    for engine in (name for name in MEASURED if missing(name) is None):
        for precision in precisions(engine):
            if heavy and engine == "torch" and precision != "fp32":
                progress(f"{engine} {precision} is not measured: a CPU would take hours")
                continue
            progress(f"parity of {engine} {precision}")
            opened = open_engine(folder, manifest, engine, "cpu", precision)
            try:
                rows.append(noise_parity(reference, opened, manifest))
            except EngineError as error:
                if precision == "fp32":
                    raise
                progress(f"left out: {error}")
            finally:
                opened.close()
    return dataclasses.replace(manifest, parity=tuple(rows))


def measure_bundle(
    folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda message: None
) -> Manifest:
    """Measure parity with float32 torch and the memory lines; returns the manifest with them."""
    errors: list[Parity] = []
    lines: list[Memory] = []
    # Measured on small planes: half precision on a CPU without it would take hours otherwise.
    heavy = any(part.heavy for part in manifest.parts)
    clip = {"size": (5, 6), "steps": 1} if heavy else {"size": (9, 12), "steps": 2}
    reference = open_engine(folder, manifest, "torch")
    names = [name for name in MEASURED if missing(name) is None]
    for engine, precision in ((name, p) for name in names for p in precisions(name)):
        if heavy and engine == "torch" and precision != "fp32":
            progress(f"{engine} {precision} is not measured: a CPU would take hours")
            continue
        opened = open_engine(folder, manifest, engine, "cpu", precision)
        progress(f"parity of {engine} {precision}")
        try:
            errors.append(parity(reference, opened, manifest, **clip))  # type: ignore[arg-type]
        except EngineError as error:
            if precision == "fp32":
                raise
            progress(f"left out: {error}")
            continue
        finally:
            opened.close()
        if engine == "torch" and precision != "fp32":
            continue  # the line of fp32 serves
        progress(f"memory of {engine} {precision}")
        for direction in DIRECTIONS:
            sides = (8, 16) if heavy else (32, 64)
            lines += memory_lines(folder, manifest, engine, precision, direction, sides)
    return dataclasses.replace(manifest, parity=tuple(errors), memory=tuple(lines))


def memory_lines(
    folder: Path,
    manifest: Manifest,
    engine: str,
    precision: str,
    direction: str,
    sides: tuple[int, int],
) -> list[Memory]:
    """Bound every stage's peak from two sizes: a line through its steps, and what compiling takes.

    On small planes compiling takes more than the steps, and would hide how those grow.
    """
    small, large = (
        in_process(
            task="stages",
            bundle=str(folder),
            engine=engine,
            precision=precision,
            direction=direction,
            side=side,
        )
        for side in sides
    )
    lines = []
    for stage, high in large.items():
        scale = manifest.stage_part(stage, first=False).scale
        least, most = ((side * scale) ** 2 for side in sides)
        low = small[stage]
        per_cell = max(1, -(-(high["last"] - low["last"]) // (most - least)))
        fixed = max(0, low["last"] - per_cell * least)
        kept, compiling = max(low["kept"], high["kept"]), low["most"]
        line = Memory(engine, precision, stage, fixed, per_cell, kept, compiling)
        short = max(0, high["most"] - line.bytes(most))  # a first step may take more than others
        lines.append(dataclasses.replace(line, fixed=fixed + short))
    return lines
