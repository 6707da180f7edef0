"""`fvae export`: export weights to a bundle, and measure parity and memory in every engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fvae_deploy.bench.run import DIRECTIONS
from fvae_deploy.bench.worker import in_process
from fvae_deploy.engines.base import PRECISIONS, Engine, missing, open_engine, precisions
from fvae_deploy.errors import EngineError
from fvae_deploy.export.averaging import measured
from fvae_deploy.export.bundle import Bundle, sha256
from fvae_deploy.export.check import noise_parity, parity
from fvae_deploy.export.draft import LoadedModel
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.generators import load_generator
from fvae_deploy.export.int8 import FILE, write
from fvae_deploy.export.manifest import Manifest, Memory, Parity
from fvae_deploy.export.probe import parts_of
from fvae_deploy.export.sources import Foreign, load
from fvae_deploy.export.to_onnx import ExportOptions, export_bundle, write_bundle
from fvae_deploy.make.calibration import calibrate, check_cts
from fvae_deploy.make.segments import segment_memory, segments_agree
from fvae_deploy.parse import hu_window as parse_window
from fvae_deploy.version import __version__

MOST = 1e12  # multiply-adds of a run that measures memory: half a minute on two cores
MEASURED = ("openvino", "onnxruntime", "torch")
ENOUGH = 32  # latent cells along a plane from which on it shows what a first step takes
STEEPER = 1.2  # 1.12 to 1.17 were missing: decoder of `tiny`, 64x64 cells told from 8x8 and 16x16

Progress = Callable[[str], None]
Pairs = Sequence[tuple[str, str]]  # engines and precisions
Row = TypeVar("Row")


def make_bundle(
    model: str | Path,
    folder: Path,
    *,
    name: str | None = None,
    channels: str = "published",
    foreign: Foreign | None = None,
    hu_window: str | tuple[float, float] | None = None,
    opset: int = 18,
    calibration: Sequence[Path] = (),
    engines: Pairs | None = None,
    progress: Progress = lambda message: None,
) -> Manifest:
    """Export a VAE to a new bundle and measure it in the engines that run on this machine.

    `model`, `channels` and `foreign` are arguments of `export.sources.load`, `opset` is the ONNX
    operator set. `hu_window` are the HU that become the model's range unless a run says otherwise
    (see `parse.hu_window`); None: -1000 to 1000. For `gray`, the export also measures what
    averaging first costs. `calibration` are CTs from which convolutions get ranges for int8.
    `engines` are those to measure, in these precisions and in fp32; None: all there are. The
    folder appears when everything is measured. Raises BundleError for weights or a folder that do
    not fit, EngineError for an engine or a precision that does not run here.
    """
    pairs = measurable(engines, calibrated=bool(calibration))
    if calibration:  # before graphs are exported, which takes minutes
        _check_int8()
        check_cts(calibration)
    progress("loading weights")
    loaded = load(str(model), channels=channels, foreign=foreign, progress=progress)
    if hu_window is not None:
        loaded = _with_window(loaded, *parse_window(hu_window))
    if channels == "gray" and not loaded.model.foreign:
        loaded = _with_averaging_error(loaded, str(model), progress)

    def measure(where: Path, manifest: Manifest) -> Manifest:
        if calibration:
            manifest = calibrated(where, manifest, calibration, progress)
        return measure_bundle(where, manifest, progress, pairs)

    options = ExportOptions(opset, progress, measure)
    loaded = dataclasses.replace(loaded, name=name or loaded.name)
    return export_bundle(loaded, folder, version=__version__, options=options)


def calibrated(
    folder: Path, manifest: Manifest, cts: Sequence[Path], progress: Progress
) -> Manifest:
    """Choose ranges for int8 from CTs and store them; returns the manifest with their file.

    Raises EngineError on a machine that does not compute in int8, which could not measure it.
    """
    _check_int8()
    progress("choosing ranges for int8")
    write(folder, calibrate(folder, cts, progress))
    manifest = dataclasses.replace(manifest, files=manifest.files | {FILE: sha256(folder / FILE)})
    manifest.save(folder)
    return manifest


def _check_int8() -> None:
    if "int8" not in precisions("openvino"):
        raise EngineError(
            "expected a CPU that computes in int8 (AVX-VNNI, AVX-512 VNNI or AMX) for --calibrate, "
            "found none: export on such a machine, or leave it out"
        )


def make_generator_bundle(
    weights: Path,
    folder: Path,
    *,
    name: str | None = None,
    config: Path | None = None,
    text: str | None = None,
    generator: str | None = None,
    opset: int = 18,
    engines: Pairs | None = None,
    progress: Progress = lambda message: None,
) -> GeneratorManifest:
    """Export a generator to a new bundle and measure one step in the engines of this machine.

    `name`, `config`, `text` and `generator` are arguments of `export.generators.load_generator`,
    `opset` is the ONNX operator set, `engines` as in `make_bundle`. The folder appears when
    everything is measured. Raises BundleError for files or a folder that do not fit, EngineError
    for an engine or a precision that does not run here.
    """
    pairs = measurable(engines)
    progress("loading weights")
    draft = load_generator(
        weights,
        name=name,
        config=config,
        text=text,
        generator=generator,
        version=__version__,
        progress=progress,
    )
    options = ExportOptions(
        opset, progress, lambda where, manifest: measure_generator(where, manifest, progress, pairs)
    )
    return write_bundle(draft, folder, options)


def measure_generator(
    folder: Path, manifest: GeneratorManifest, progress: Progress, pairs: Pairs
) -> GeneratorManifest:
    """Measure parity of one step with float32 torch; returns the manifest with the results."""
    reference = open_engine(folder, manifest, "torch")
    rows = _compare_engines(
        folder,
        manifest,
        lambda engine: noise_parity(reference, engine, manifest),
        pairs,
        heavy=manifest.part("denoise").heavy,
        progress=progress,
    )
    return dataclasses.replace(manifest, parity=tuple(row for _, _, row in rows))


def _with_window(loaded: LoadedModel, low: float, high: float) -> LoadedModel:
    """Replace the HU window of a network."""
    intensity = dataclasses.replace(loaded.model.intensity, hu_min=low, hu_max=high)
    return dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, intensity=intensity))


def _with_averaging_error(loaded: LoadedModel, text: str, progress: Progress) -> LoadedModel:
    """Measure and report what gray weights change, unless the network has a single channel."""
    clamped = load(text).model
    if not clamped.averaging.clamped:
        return loaded
    progress("measuring what it changes to average the channels first")
    heavy = any(part.heavy for part in parts_of(clamped))
    model = measured(loaded.model, clamped, *(((5, 6), 1) if heavy else ((9, 12), 2)))
    mean, most = model.averaging.hu_mean, model.averaging.hu_max
    progress(
        f"gray averages the channels before they are clamped: {mean:.2g} HU in the mean and "
        f"{most:.3g} HU at most from the published order, on a clip of which most voxels are at "
        "either end of the HU window; --channels published has no such error"
    )
    return dataclasses.replace(loaded, model=model)


def measure_bundle(folder: Path, manifest: Manifest, progress: Progress, pairs: Pairs) -> Manifest:
    """Measure parity with float32 torch and the memory use; returns the manifest with both."""
    errors: list[Parity] = []
    lines: list[Memory] = []
    # Heavy networks are measured on small planes: half precision takes hours on a CPU without it.
    heavy = any(part.heavy for part in manifest.parts)
    clip: dict[str, Any] = {"size": (5, 6), "steps": 1} if heavy else {"size": (9, 12), "steps": 2}
    sides = _sides(manifest) if heavy else (32, 64)
    reference = open_engine(folder, manifest, "torch")

    wrong: set[str] = set()  # stages whose segments do not give what the whole stage gives

    def compare(engine: Engine) -> Parity:
        if engine.precision == "fp32":
            agree = functools.partial(segments_agree, engine, manifest)
            wrong.update(s for s in {p.of for p in manifest.programs} if not agree(s))
        return parity(reference, engine, manifest, **clip)

    for engine, precision, row in _compare_engines(
        folder, manifest, compare, pairs, heavy=heavy, progress=progress
    ):
        errors.append(row)
        if engine == "torch" and precision != "fp32":
            continue  # the memory line of fp32 is used for it
        progress(f"memory of {engine} {precision}")
        for direction in DIRECTIONS:
            lines += memory_lines(folder, manifest, engine, precision, direction, sides)
        # Arenas of ONNX Runtime grow over many tiles: its segments are planned by estimates.
        if manifest.programs and (engine, precision) == ("openvino", "fp32"):
            lines += segment_memory(folder, engine)
    for stage in sorted(wrong):
        progress(f"{stage} only runs whole: its segments gave another result")
    programs = tuple(p for p in manifest.programs if p.of not in wrong)
    return dataclasses.replace(
        manifest, parity=tuple(errors), memory=tuple(lines), programs=programs
    )


def measurable(engines: Pairs | None, *, calibrated: bool = False) -> list[tuple[str, str]]:
    """Return the engines and precisions to measure, fp32 first; None: all of this machine.

    Raises EngineError for one that does not run here.
    """
    able = (*PRECISIONS, "int8") if calibrated else PRECISIONS
    here = {
        name: [p for p in precisions(name) if p in able]
        for name in MEASURED
        if missing(name) is None
    }
    for name, precision in engines or ():
        if precision not in here.get(name, ()):
            found = ", ".join(f"{n}:{p}" for n, ps in here.items() for p in ps)
            raise EngineError(
                f"expected --engines that this export can measure here ({found}), found "
                f"{name}:{precision}: name one of these"
            )
    asked = None if engines is None else {*engines, *((name, "fp32") for name, _ in engines)}
    pairs = [(name, p) for name, ps in here.items() for p in ps]
    return [pair for pair in pairs if asked is None or pair in asked]


def _sides(manifest: Manifest) -> tuple[int, int]:
    """Return the sides, in latent cells, of two planes on which a heavy network is measured."""
    g = manifest.geometry
    frames = g.first_frames if g.first_slices > 1 else 1
    work = frames * max(part.mac_per_cell * part.scale**2 for part in manifest.parts)
    return (8, 16) if work * 16**2 <= MOST else (4, 8)


def _compare_engines(
    folder: Path,
    manifest: Bundle,
    compare: Callable[[Engine], Row],
    pairs: Pairs,
    *,
    heavy: bool,
    progress: Progress,
) -> Iterator[tuple[str, str, Row]]:
    """Open engines in precisions, on this machine's CPU, and yield what `compare` returns.

    A precision other than fp32 in which the network overflows is reported and skipped.
    """
    for name, precision in pairs:
        if heavy and name == "torch" and precision != "fp32":
            progress(f"{name} {precision} is not measured: it would take hours on a CPU")
            continue
        progress(f"parity of {name} {precision}")
        engine = open_engine(folder, manifest, name, "cpu", precision)
        try:
            row = compare(engine)
        except EngineError as error:
            if precision == "fp32":
                raise
            progress(f"left out: {error}")
            continue
        finally:
            engine.close()
        yield name, precision, row


def memory_lines(
    folder: Path,
    manifest: Manifest,
    engine: str,
    precision: str,
    direction: str,
    sides: tuple[int, int],
) -> list[Memory]:
    """Return an upper bound of every stage's memory as a line through the peaks at two sizes.

    The line goes through the peaks of the last steps. Compiling has its own bound: on small planes
    it takes more than the steps do, and would hide how their memory grows with the size. It also
    hides what a first step takes beyond later ones, so that lines from small planes are steeper.
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
        few_cells, many_cells = ((side * scale) ** 2 for side in sides)
        low = small[stage]
        per_cell = max(1, -(-(high["last"] - low["last"]) // (many_cells - few_cells)))
        fixed = max(0, low["last"] - per_cell * few_cells)
        per_cell = int(per_cell * (STEEPER if max(sides) < ENOUGH else 1))
        kept, compiling = max(low["kept"], high["kept"]), low["most"]
        line = Memory(engine, precision, stage, fixed, per_cell, kept, compiling)
        # A first step may take more memory than later ones.
        excess = max(0, high["most"] - line.bytes(many_cells))
        lines.append(dataclasses.replace(line, fixed=fixed + excess))
    return lines
