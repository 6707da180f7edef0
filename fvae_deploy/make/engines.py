"""`fvae build`: plan the sizes that every part of a bundle needs, and build its engines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fvae_deploy.engines import devices
from fvae_deploy.errors import UsageError
from fvae_deploy.export.built import ANY
from fvae_deploy.export.bundle import Bundle, kind_of
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.known import known
from fvae_deploy.export.manifest import QUANTISED, Manifest
from fvae_deploy.export.to_tensorrt import Row, Sizes, Variant, build, check_request
from fvae_deploy.parse import parse_bytes
from fvae_deploy.stream.codec import bundle_path
from fvae_deploy.stream.plan import plan

TOKENS = 512  # largest length of a text if the bundle has no text encoder
SPATIAL = 8  # pixels per latent cell of a generator's VAE, if that is unknown


def open_bundle(model: str | Path) -> tuple[Path, Bundle]:
    """Load the bundle of a VAE or generator; returns its folder and manifest."""
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

    `planes` are the sizes of slices in pixels, `any_size` adds engines for all smaller sizes,
    `step` is the number of latent frames per step, `memory` the GPU memory that tiles are planned
    for. `calibration` are CTs for int8 and fp8. `begin` is called with a target and its number of
    engines, and returns a function that is called after each. Raises UsageError for options that
    do not fit, and EngineError with TensorRT's message if a part does not build.
    """
    if not targets:
        raise UsageError("expected --target like sm_89,sm_120, found none: name a GPU architecture")
    if package == "tensorrt":
        _check_own_gpu(targets)
    for target in targets:
        for precision in precisions:
            check_request(package, target, precision)
    if calibration:  # before engines are built, which takes minutes
        from fvae_deploy.make.calibration import check_cts

        check_cts(calibration)
    path, manifest = open_bundle(model)
    by_part = variants(manifest, planes, any_size, step, memory)
    rows: list[Row] = []
    for precision in precisions:
        with _graphs(path, manifest, precision, calibration) as graphs:
            for target in targets:
                count = sum(map(len, by_part.values()))
                advance = begin(f"{target} {precision}", count)
                for row in build(
                    path,
                    manifest,
                    by_part,
                    target=target,
                    precision=precision,
                    package=package,
                    graphs=graphs,
                ):
                    rows.append(row)
                    advance(1)
    return rows


def _check_own_gpu(targets: Sequence[str]) -> None:
    """Raise UsageError for other targets than this machine's GPU; TensorRT builds only for that."""
    own = devices.target()
    for target in targets:
        if target != own:
            raise UsageError(
                f"expected {own or 'a GPU in this machine'} for --package tensorrt, found "
                f"{target!r}: build on a machine with that GPU"
            )


def variants(
    manifest: Bundle, planes: Sequence[tuple[int, int]], any_size: bool, step: int, memory: str
) -> dict[str, list[Variant]]:
    """Return the sizes to build for every part: planned tiles, and with `any_size` a range."""
    if isinstance(manifest, GeneratorManifest):
        return _generator_variants(manifest, planes, any_size)
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
    by_part: dict[str, list[Variant]] = {}
    for part in manifest.parts:
        k = step if part.inputs[0].factor("k") else 1
        extents = dict.fromkeys(grid[part.stage].extent for grid in grids)
        sizes = [Variant(f"{k}x{h}x{w}", *3 * [Sizes(k, h, w)]) for h, w in extents]
        if any_size:
            most = Sizes(k, *(part.scale * max(n) for n in zip(*cells, strict=True)))
            sizes.append(Variant(ANY, Sizes(), sizes[0].planned, most))
        by_part[part.name] = sizes
    return by_part


def _generator_variants(
    manifest: GeneratorManifest, planes: Sequence[tuple[int, int]], any_size: bool
) -> dict[str, list[Variant]]:
    """Return sizes for whole planes and windows, and for texts of any length."""
    vae = known(manifest.vae)
    side = (vae.spatial if vae else SPATIAL) * manifest.multiple
    tokens = manifest.tokens or TOKENS
    cells = [_cells(plane, side) for plane in planes or [manifest.plane]]
    k = manifest.window
    sizes = [
        Variant(f"{k}x{h}x{w}", Sizes(k, h, w), *2 * [Sizes(k, h, w, tokens)]) for h, w in cells
    ]
    if any_size:
        h, w = (max(n) for n in zip(*cells, strict=True))
        sizes.append(Variant(ANY, Sizes(2), sizes[0].planned, Sizes(k, h, w, tokens)))
    # The sizes of the text's parts do not depend on the plane.
    return {p.name: sizes if p.inputs[0].factor("h") else sizes[:1] for p in manifest.parts}


def _cells(plane: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size of a plane in cells of side x side pixels."""
    if any(n % side or n < side for n in plane):
        raise UsageError(
            f"expected --size in multiples of {side}, found {plane[0]},{plane[1]}: round it up"
        )
    return plane[0] // side, plane[1] // side


@contextmanager
def _graphs(
    path: Path, manifest: Bundle, precision: str, calibration: Sequence[Path]
) -> Iterator[Mapping[str, Path] | None]:
    """Yield quantised graphs in a temporary folder for int8 and fp8, or None for the others."""
    if precision not in QUANTISED:
        yield None
        return
    if not isinstance(manifest, Manifest):
        raise UsageError(f"expected a VAE for {precision}, found {manifest.name}: use fp16 or bf16")
    if not calibration:
        raise UsageError(
            f"expected --calibrate CT for {precision}, found none: give one or more CTs"
        )
    from fvae_deploy.export.quantize import quantize
    from fvae_deploy.make.calibration import record

    with tempfile.TemporaryDirectory() as folder:
        yield quantize(path, manifest, record(path, calibration), Path(folder), precision)


def row_facts(row: Row) -> dict[str, Any]:
    """Return an engine and the cost of its build as plain data, for the table and the JSON."""
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
