"""`fvae build`: which sizes every part of a bundle will meet, and its engines for some GPUs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fvae_deploy.engines import devices
from fvae_deploy.engines.base import QUANTISED
from fvae_deploy.errors import UsageError
from fvae_deploy.export.built import ANY
from fvae_deploy.export.bundle import Bundle, kind_of
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.known import known
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.to_tensorrt import Row, Sizes, Variant, build, check_request
from fvae_deploy.parse import parse_bytes
from fvae_deploy.stream.codec import bundle_path
from fvae_deploy.stream.plan import plan

TOKENS = 512  # of a text whose encoder is not in the bundle
SPATIAL = 8  # of the VAE of a generator, where nobody said


def open_bundle(model: str | Path) -> tuple[Path, Bundle]:
    """Read a bundle of either kind."""
    path = bundle_path(model)
    kind: type[Bundle] = GeneratorManifest if kind_of(path) == GeneratorManifest.KIND else Manifest
    return path, kind.load(path)


def make_engines(
    model: str | Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    *,
    package: str = "tensorrt_rtx",
    planes: Sequence[tuple[int, int]] = (),
    any_size: bool = False,
    step: int = 1,
    memory: str = "8GiB",
    calibration: Sequence[Path] = (),
    begin: Callable[[str, int], Callable[[int], None]] = lambda stage, length: lambda done: None,
) -> list[Row]:
    """Build engines of all parts for every target and precision.

    `planes` are the sizes of slices in pixels, `any_size` adds engines for all smaller ones,
    `step` is the latent frames of a step, `memory` the GPU's that tiles are planned for. Raises
    UsageError for what cannot be asked for, EngineError with TensorRT's words where a part does
    not build.
    """
    if not targets:
        raise UsageError("expected --target as sm_89,sm_120, found none: name a GPU architecture")
    if package == "tensorrt":
        _check_here(targets)
    for target in targets:
        for precision in precisions:
            check_request(package, target, precision)
    path, manifest = open_bundle(model)
    wanted = variants(manifest, planes, any_size, step, memory)
    rows: list[Row] = []
    for precision in precisions:
        with _graphs(path, manifest, precision, calibration) as graphs:
            for target in targets:
                count = sum(map(len, wanted.values()))
                advance = begin(f"{target} {precision}", count)
                for row in build(
                    path,
                    manifest,
                    wanted,
                    target=target,
                    precision=precision,
                    package=package,
                    graphs=graphs,
                ):
                    rows.append(row)
                    advance(1)
    return rows


def _check_here(targets: Sequence[str]) -> None:
    """TensorRT builds for the GPU that is here, whatever it is asked for."""
    here = devices.target()
    for target in targets:
        if target != here:
            raise UsageError(
                f"expected {here or 'a GPU here'} for --package tensorrt, found {target!r}: build "
                "on a machine with that GPU"
            )


def variants(
    manifest: Bundle, planes: Sequence[tuple[int, int]], any_size: bool, step: int, memory: str
) -> dict[str, list[Variant]]:
    """Sizes of the engines of every part: the planned tiles, and all up to the largest plane."""
    if isinstance(manifest, GeneratorManifest):
        return _of_generator(manifest, planes, any_size)
    assert isinstance(manifest, Manifest)
    manifest.check_step(step)
    spatial = manifest.geometry.spatial
    cells = [_cells(plane, spatial) for plane in planes or [(512, 512)]]
    grids = [
        plan(
            manifest,
            ("encode", "decode"),
            plane,
            engine="tensorrt",
            precision="fp32",
            memory=parse_bytes(memory),
            k=step,
        ).grids
        for plane in cells
    ]
    found: dict[str, list[Variant]] = {}
    for part in manifest.parts:
        k = step if part.inputs[0].factor("k") else 1
        extents = dict.fromkeys(each[part.stage].extent for each in grids)
        those = [Variant(f"{k}x{h}x{w}", *3 * [Sizes(k, h, w)]) for h, w in extents]
        if any_size:
            most = Sizes(k, *(part.scale * max(n) for n in zip(*cells, strict=True)))
            those.append(Variant(ANY, Sizes(), those[0].planned, most))
        found[part.name] = those
    return found


def _of_generator(
    manifest: GeneratorManifest, planes: Sequence[tuple[int, int]], any_size: bool
) -> dict[str, list[Variant]]:
    """Whole windows of a plane; texts have any length."""
    vae = known(manifest.vae)
    side = (vae.spatial if vae else SPATIAL) * manifest.multiple
    tokens = manifest.tokens or TOKENS
    cells = [_cells(plane, side) for plane in planes or [manifest.plane]]
    k = manifest.window
    those = [
        Variant(f"{k}x{h}x{w}", Sizes(k, h, w), *2 * [Sizes(k, h, w, tokens)]) for h, w in cells
    ]
    if any_size:
        h, w = (max(n) for n in zip(*cells, strict=True))
        those.append(Variant(ANY, Sizes(2), those[0].planned, Sizes(k, h, w, tokens)))
    # The text's parts know no planes.
    return {p.name: those if p.inputs[0].factor("h") else those[:1] for p in manifest.parts}


def _cells(plane: tuple[int, int], side: int) -> tuple[int, int]:
    if any(n % side or n < side for n in plane):
        raise UsageError(f"expected --size in multiples of {side}, found {plane[0]},{plane[1]}")
    return plane[0] // side, plane[1] // side


@contextmanager
def _graphs(
    path: Path, manifest: Bundle, precision: str, calibration: Sequence[Path]
) -> Iterator[Mapping[str, Path] | None]:
    """Quantise in a folder that goes; precisions with a mantissa need no graphs of their own."""
    if precision not in QUANTISED:
        yield None
        return
    if not isinstance(manifest, Manifest):
        raise UsageError(f"expected a VAE for {precision}, found {manifest.name}: use fp16 or bf16")
    if not calibration:
        raise UsageError(
            f"expected --calibrate CT for {precision}, found none: name one or more CTs"
        )
    from fvae_deploy.export.quantize import quantize
    from fvae_deploy.make.calibration import record

    with tempfile.TemporaryDirectory() as folder:
        yield quantize(path, manifest, record(path, calibration), Path(folder), precision)


def row_facts(row: Row) -> dict[str, Any]:
    """Say what was built in plain data, as the table and the JSON show it."""
    built = row.built
    return {
        "part": built.part,
        "variant": built.variant,
        "target": built.target,
        "precision": built.precision,
        "package": built.package,
        "version": built.version,
        "profile": dict(built.profile),
        "bytes": built.bytes,
        "seconds": row.seconds,
        "peak_bytes": row.peak_bytes,
        "sha256": built.sha256,
    }
