"""TensorRT engines stored beside a bundle: their files, and a description of each.

    BUNDLE/engines/sm_89/fp16/encode_step.1x64x64.engine     the file that TensorRT loads
                              encode_step.1x64x64.json       its description, a `BuiltEngine`
                              encode_step.any.engine         the same part for a range of sizes

Engines can always be built again from the bundle, so one that does not fit raises an error and
is never repaired.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle, sha256

FOLDER = "engines"
ANY = "any"  # the variant for a range of sizes
TYPES = {  # type of the states, by precision
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",
    "fp8": "float32",
}

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # smallest, the one tuned for, largest
Profile = Mapping[str, Range]  # by name of the input


@dataclass(frozen=True)
class BuiltEngine:
    """Description of one engine: one part, for one GPU architecture, in one precision."""

    part: str
    variant: str  # sizes that it was built for, as in the file name: "1x64x64" or "any"
    target: str  # GPU architecture, like sm_89
    precision: str
    package: str  # tensorrt_rtx or tensorrt
    version: str  # of that package
    bundle: str  # `fingerprint` of the bundle that it was built from
    state: str  # type of its state inputs and outputs; data are float32
    profile: Profile  # the input shapes that it accepts
    bytes: int
    sha256: str

    @property
    def file(self) -> str:
        """Name of the engine's file without its suffix."""
        return f"{self.part}.{self.variant}"

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether the engine accepts inputs of these shapes."""
        return all(_within(shapes[name], *limits) for name, limits in self.profile.items())

    def save(self, folder: Path) -> None:
        """Write this description beside its engine."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / f"{self.file}.json").write_text(text + "\n", encoding="utf-8")


def fingerprint(bundle: Bundle) -> str:
    """Return a hash of all files of a bundle; an engine with another one is stale."""
    return hashlib.sha256(json.dumps(sorted(bundle.files.items())).encode()).hexdigest()


def folder_of(bundle: Path, target: str, precision: str) -> Path:
    """Return the folder of the engines for one architecture and precision."""
    return bundle / FOLDER / target / precision


def find(
    bundle: Path, manifest: Bundle, target: str, precision: str
) -> dict[str, list[BuiltEngine]]:
    """Return the engines of every part, those for one size before those for a range.

    The engine files themselves are not read; `read_engine` checks them. Raises EngineError with
    the remedy if an engine is missing, stale or for another architecture.
    """
    folder = folder_of(bundle, target, precision)
    remedy = f"fvae build {bundle} --target {target} --precision {precision}"
    if not folder.is_dir():
        folders = sorted(str(p.relative_to(bundle)) for p in (bundle / FOLDER).glob("*/*"))
        raise EngineError(
            f"expected engines for {target} in {precision} beside {manifest.name}, found "
            f"{', '.join(folders) or 'none'}: run {remedy}"
        )
    by_part: dict[str, list[BuiltEngine]] = {part.name: [] for part in manifest.parts}
    for path in sorted(folder.glob("*.json")):
        engine = _read(path, remedy)
        for what, expected, actual in (
            ("architecture", target, engine.target),
            ("precision", precision, engine.precision),
            ("bundle", fingerprint(manifest)[:12], engine.bundle[:12]),
        ):
            if expected != actual:
                raise EngineError(
                    f"expected an engine for {what} {expected}, found {path} for {actual}: it is "
                    f"stale, run {remedy}"
                )
        by_part.setdefault(engine.part, []).append(engine)
    for name, engines in by_part.items():
        if not engines:
            raise EngineError(f"expected an engine of {name} in {folder}, found none: run {remedy}")
        engines.sort(key=lambda engine: engine.variant == ANY)
    return by_part


def read_engine(bundle: Path, engine: BuiltEngine) -> bytes:
    """Read an engine file; raises EngineError if its bytes are not those that were built."""
    path = folder_of(bundle, engine.target, engine.precision) / f"{engine.file}.engine"
    remedy = f"fvae build {bundle} --target {engine.target} --precision {engine.precision}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(
            f"expected an engine {path}, found {error.strerror}: run {remedy}"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != engine.sha256:
        raise EngineError(
            f"expected {engine.bytes} bytes with sha256 {engine.sha256[:12]}… in {path}, found "
            f"{len(content)} bytes with {digest[:12]}…: the file is damaged, run {remedy}"
        )
    return content


def describe(path: Path, **facts: Any) -> BuiltEngine:
    """Return the description of an engine file; `facts` are its fields besides size and hash."""
    return BuiltEngine(bytes=path.stat().st_size, sha256=sha256(path), **facts)


def _read(path: Path, remedy: str) -> BuiltEngine:
    try:
        content = json.loads(path.read_bytes())
        profile = {
            name: tuple(tuple(map(int, shape)) for shape in limits)
            for name, limits in content.pop("profile").items()
        }
        return BuiltEngine(profile=profile, **content)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise EngineError(f"expected {path}, found none: run {remedy}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(
            f"expected the description of an engine in {path}, found {type(error).__name__}: "
            f"run {remedy}"
        ) from None


def _within(shape: Shape, smallest: Shape, tuned: Shape, largest: Shape) -> bool:
    """Return whether every size of a shape lies between the smallest and the largest."""
    return len(shape) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )
