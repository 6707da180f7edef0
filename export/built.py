"""Engines built ahead of time beside a bundle: where they lie, and what each says of itself.

    BUNDLE/engines/sm_89/fp16/encode_step.1x64x64.engine     what TensorRT loads
                              encode_step.1x64x64.json       a `Built`
                              encode_step.any.engine         the same part for a range of sizes

They can always be built again from the bundle, so whatever does not fit is refused, never mended.
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
TYPES = {  # of states
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",
    "fp8": "float32",
}

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # least, best, most
Profile = Mapping[str, Range]  # by input


@dataclass(frozen=True)
class Built:
    """One engine: one part, for one GPU architecture, in one precision."""

    part: str
    variant: str  # which sizes it is for: the file's second name
    target: str  # sm_89
    precision: str
    package: str  # tensorrt_rtx or tensorrt
    version: str  # of that package
    bundle: str  # `fingerprint` of the bundle that it was built from
    state: str  # type of the states that it takes and returns; data are float32
    profile: Profile  # the shapes that it takes
    bytes: int
    sha256: str

    @property
    def file(self) -> str:
        """Name of the engine's file without its end."""
        return f"{self.part}.{self.variant}"

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes lie within its ranges."""
        return all(_within(shapes[name], *each) for name, each in self.profile.items())

    def save(self, folder: Path) -> None:
        """Write it beside its engine."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / f"{self.file}.json").write_text(text + "\n", encoding="utf-8")


def fingerprint(bundle: Bundle) -> str:
    """Hash of all files of a bundle: an engine of another one is stale."""
    return hashlib.sha256(json.dumps(sorted(bundle.files.items())).encode()).hexdigest()


def folder_of(bundle: Path, target: str, precision: str) -> Path:
    """Where engines for one architecture and precision lie."""
    return bundle / FOLDER / target / precision


def find(bundle: Path, manifest: Bundle, target: str, precision: str) -> dict[str, list[Built]]:
    """Return the engines of every part, narrow ones first, each checked but for its bytes.

    Raises EngineError with the remedy where one is missing, stale or for another architecture.
    """
    folder = folder_of(bundle, target, precision)
    remedy = f"fvae build {bundle} --target {target} --precision {precision}"
    if not folder.is_dir():
        found = sorted(str(p.relative_to(bundle)) for p in (bundle / FOLDER).glob("*/*"))
        raise EngineError(
            f"expected engines for {target} in {precision} beside {manifest.name}, found "
            f"{', '.join(found) or 'none'}: {remedy}"
        )
    built: dict[str, list[Built]] = {part.name: [] for part in manifest.parts}
    for path in sorted(folder.glob("*.json")):
        each = _read(path, remedy)
        for what, expected, have in (
            ("architecture", target, each.target),
            ("precision", precision, each.precision),
            ("bundle", fingerprint(manifest)[:12], each.bundle[:12]),
        ):
            if expected != have:
                raise EngineError(
                    f"expected an engine of {what} {expected}, found {path} of {have}: it is "
                    f"stale, {remedy}"
                )
        built.setdefault(each.part, []).append(each)
    for name, those in built.items():
        if not those:
            raise EngineError(f"expected an engine of {name} in {folder}, found none: {remedy}")
        those.sort(key=lambda each: each.variant == ANY)
    return built


def read_engine(bundle: Path, each: Built) -> bytes:
    """Read an engine whole; raises EngineError where its bytes are not those that were built."""
    path = folder_of(bundle, each.target, each.precision) / f"{each.file}.engine"
    remedy = f"fvae build {bundle} --target {each.target} --precision {each.precision}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(f"expected an engine {path}, found {error.strerror}: {remedy}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != each.sha256:
        raise EngineError(
            f"expected {each.bytes} bytes of sha256 {each.sha256[:12]}… in {path}, found "
            f"{len(content)} of {found[:12]}…: it is damaged, {remedy}"
        )
    return content


def describe(path: Path, **facts: Any) -> Built:
    """Say of an engine file what it is."""
    return Built(bytes=path.stat().st_size, sha256=sha256(path), **facts)


def _read(path: Path, remedy: str) -> Built:
    try:
        content = json.loads(path.read_bytes())
        profile = {
            name: tuple(tuple(map(int, shape)) for shape in each)
            for name, each in content.pop("profile").items()
        }
        return Built(profile=profile, **content)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise EngineError(f"expected {path}, found none: {remedy}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(
            f"expected the description of an engine in {path}, found {type(error).__name__}: "
            f"{remedy}"
        ) from None


def _within(shape: Shape, least: Shape, best: Shape, most: Shape) -> bool:
    """Whether a shape lies between two others; `best` is what the engine is tuned for."""
    return len(shape) == len(least) and all(
        a <= n <= b for a, n, b in zip(least, shape, most, strict=True)
    )
