"""The bundle's manifest: everything an engine and the stream must know about a network.

A bundle is a folder:

    manifest.json         this file's `Manifest`
    weights.safetensors   the exported weights; the graphs refer into it
    *.onnx                one graph a part, holding no weights of its own

`Manifest.load` checks the schema version, every field's type and every file's sha256, so
that a damaged bundle or one of another version is refused with the remedy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.errors import BundleError, UsageError

SCHEMA = 2
FILENAME = "manifest.json"

# Multiply-adds for a latent cell from which on a part is heavy: compiling it or allocating its
# working memory anew costs nothing next to a run, so neither is kept while others run.
HEAVY = 5e6

SIZE = r"([1-9]\d*\*)?[khw]|[1-9]\d*"
Dimension = int | str  # 16, or an expression in k, h, w: "k", "4*k", "8*h"


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a part; float32, symbolic sizes in k, h and w.

    k counts latent frames; h and w count the part's cells (see `Part.scale`).
    """

    name: str
    shape: tuple[Dimension, ...]

    def sized(self, k: int, h: int, w: int) -> tuple[int, ...]:
        """Return the shape for k latent frames of h x w latent cells."""
        symbols = {"k": k, "h": h, "w": w}
        sizes = []
        for dimension in self.shape:
            factor, _, symbol = str(dimension).rpartition("*")
            size = symbols[symbol] if symbol in symbols else int(symbol)
            sizes.append(size * int(factor or 1))
        return tuple(sizes)

    def factor(self, symbol: str) -> int:
        """How many of this tensor's elements lie along one k, h or w; 0 where it has none."""
        for dimension in self.shape:
            factor, _, found = str(dimension).rpartition("*")
            if found == symbol:
                return int(factor or 1)
        return 0

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether some k, h and w of at least 1 give this shape."""
        if len(shape) != len(self.shape):
            return False
        for size, dimension in zip(shape, self.shape, strict=True):
            factor, _, symbol = str(dimension).rpartition("*")
            if symbol not in ("k", "h", "w"):
                if size != int(symbol):
                    return False
            elif size < 1 or size % int(factor or 1):
                return False
        return True


@dataclass(frozen=True)
class Part:
    """One exported graph: a stage of encoder or decoder, on the first frames or on later ones.

    Parts are named STAGE_first and STAGE_step; stages begin with encode or decode and run in
    the order of the manifest, each on the whole map that the one before made. The first input
    and the first output carry the data; all further ones are state, in the same order.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    scale: int  # cells of this part along H, and along W, in one latent cell
    halo: int | None  # its reach along H and W in its own cells; None: it sees the whole plane
    context: int  # its reach back in latent frames
    mac_per_cell: int  # multiply-adds for one cell of one latent frame
    whole: str = ""  # why it sees the whole plane

    @property
    def heavy(self) -> bool:
        """Whether a run costs so much that nothing need be kept ready for it."""
        return self.mac_per_cell * self.scale**2 > HEAVY

    @property
    def state_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that carry state."""
        return self.inputs[1:]

    @property
    def state_outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that carry state, in the order of `state_inputs` of the step part."""
        return self.outputs[1:]


@dataclass(frozen=True)
class Source:
    """Where the weights came from: a name, path or hub id, its revision and its sha256."""

    id: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class Network:
    """What the torch engine needs to rebuild the exported network."""

    family: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """How latents lie over frames: strides, channels, and what a stream begins with.

    The first step takes `first_slices` slices to `first_frames` latent frames, further ones
    `temporal` slices a latent frame. A network without causal state takes a whole window at
    once: its first step is the window, and there are no further ones.
    """

    temporal: int
    spatial: int
    latent_channels: int
    channels: int
    window: int  # slices of one window in the `windows` protocol
    first_slices: int = 1
    first_frames: int = 1

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that the network can follow, its own first."""
        return ("windows",) if self.first_slices > 1 else ("causal", "windows")


@dataclass(frozen=True)
class Intensity:
    """HU window [hu_min, hu_max] mapped linearly to the model's range and back."""

    hu_min: float
    hu_max: float
    model_min: float
    model_max: float


@dataclass(frozen=True)
class LatentNormalisation:
    """Per channel, already applied inside the parts: stored = (latent - shift) * scale."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True)
class Parity:
    """Error of one engine and precision against float32 torch, measured at export."""

    engine: str
    precision: str
    latent_max: float  # in deviations of the latent
    hu_mean: float
    hu_max: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage adds in one engine, measured at export: fixed + per_cell * cells.

    Cells are the stage's own, k * h * w of the tile that the engine computes. Of these bytes
    a heavy part keeps `kept` between runs, its states apart.
    """

    engine: str
    precision: str
    stage: str
    fixed: int
    per_cell: int
    kept: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle; see the fields' own types."""

    schema: int
    fvae_version: str
    name: str
    description: str
    licence: str
    source: Source
    network: Network
    geometry: Geometry
    intensity: Intensity
    latent: LatentNormalisation
    precision: str
    parts: tuple[Part, ...]
    files: dict[str, str]
    parity: tuple[Parity, ...] = ()
    memory: tuple[Memory, ...] = ()

    def part(self, name: str) -> Part:
        """Return the part of that name; raises BundleError when there is none."""
        for part in self.parts:
            if part.name == name:
                return part
        found = ", ".join(part.name for part in self.parts)
        raise BundleError(f"expected a part {name} in bundle {self.name}, found {found}")

    def stages(self, direction: str) -> tuple[str, ...]:
        """Names of the stages of "encode" or "decode", in the order in which they run."""
        names = (part.name.rpartition("_")[0] for part in self.parts)
        return tuple(dict.fromkeys(name for name in names if name.startswith(direction)))

    def stage_part(self, stage: str, first: bool) -> Part:
        """Return the part that runs a stage; one without state is the same for all frames."""
        names = {part.name for part in self.parts}
        other = f"{stage}_step" if first else f"{stage}_first"
        name = f"{stage}_first" if first else f"{stage}_step"
        return self.part(other if name not in names and other in names else name)

    def context(self, direction: str) -> int:
        """Latent frames that a direction sees back, all stages together."""
        return sum(self.stage_part(s, first=False).context for s in self.stages(direction))

    def check_step(self, k: int | None) -> int:
        """Return the latent frames that a step takes: `k`, or 1 for None.

        Raises UsageError where the parts take another number.
        """
        k = 1 if k is None else k
        if k < 1:
            raise UsageError(f"expected at least 1 latent frame a step, found {k}")
        steps = [part for part in self.parts if part.name.endswith("_step")]
        if k > 1 and not any(t.factor("k") for part in steps for t in part.inputs):
            raise UsageError(f"expected 1 latent frame a step of {self.name}, found {k}")
        return k

    @property
    def identity(self) -> str:
        """Short hash of the weights: latents of one identity decode with it alone."""
        return self.files["weights.safetensors"][:16]

    def save(self, folder: Path) -> None:
        """Write the manifest into the bundle's folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / FILENAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, verify: bool = True) -> Manifest:
        """Read and check a bundle.

        Raises BundleError when the folder holds no bundle, the manifest is of another schema
        or ill-typed, or (with `verify`) a file's hash differs.
        """
        path = folder / FILENAME
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"expected a bundle at {folder}, found no {FILENAME}: "
                "make one with fvae export, or see fvae models"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(
                f"expected JSON in {path}, found {error}: export the bundle again"
            ) from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise BundleError(
                f"expected bundle schema {SCHEMA}, found {schema!r:.40} in {path}: export the "
                "bundle again with this fvae, or install the fvae that made it"
            )
        manifest: Manifest = _parse(cls, content, path, "manifest")
        wanted = _first_contradiction(manifest)
        if wanted is not None:
            raise BundleError(f"expected {wanted} in {path}: export the bundle again")
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """Compare every file's sha256; raises BundleError for the first that differs."""
        for name, expected in self.files.items():
            try:
                found = sha256(folder / name)
            except OSError as error:
                raise BundleError(
                    f"expected {name} in bundle {folder}, found {error.strerror}: export it again"
                ) from None
            if found != expected:
                raise BundleError(
                    f"expected sha256 {expected[:12]}… of {name} in bundle {folder}, found "
                    f"{found[:12]}…: the file was changed or damaged, export the bundle again"
                )


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(kind: Any, value: Any, path: Path, where: str) -> Any:
    """Rebuild dataclasses from JSON, checking every type on the way."""

    def refuse() -> BundleError:
        return BundleError(
            f"expected {getattr(kind, '__name__', kind)} at {where} in {path}, found "
            f"{value!r:.40}: export the bundle again"
        )

    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise refuse()
        hints, found = typing.get_type_hints(kind), {}
        for field in dataclasses.fields(kind):
            if field.name in value:
                found[field.name] = _parse(
                    hints[field.name], value[field.name], path, f"{where}.{field.name}"
                )
            elif field.default is dataclasses.MISSING:
                raise BundleError(
                    f"expected a field {field.name} at {where} in {path}, found none: "
                    "export the bundle again"
                )
        return kind(**found)
    if origin is tuple:
        if not isinstance(value, list):
            raise refuse()
        return tuple(_parse(arguments[0], item, path, f"{where}[]") for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise refuse()
        return {
            str(k): _parse(arguments[1], v, path, f"{where}[{k!r:.40}]") for k, v in value.items()
        }
    allowed = arguments if origin is types.UnionType else (kind,)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise refuse() from None
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise refuse()
    return value


def _first_contradiction(manifest: Manifest) -> str | None:
    """Return what well-typed fields must also be and one of them is not; else None."""
    names = {part.file for part in manifest.parts if part.file}
    sizes = [d for p in manifest.parts for t in (*p.inputs, *p.outputs) for d in t.shape]
    g, i = manifest.geometry, manifest.intensity
    channels = {len(manifest.latent.shift), len(manifest.latent.scale), g.latent_channels}
    window, model = (i.hu_min, i.hu_max), (i.model_min, i.model_max)
    rules = {
        "a sha256 of weights.safetensors": "weights.safetensors" in manifest.files,
        "a sha256 of every part's file": names <= manifest.files.keys(),
        "plain file names": all(_is_plain(name) for name in manifest.files),
        "sizes above 0 or like 8*h": all(re.fullmatch(SIZE, str(size)) for size in sizes),
        "an input and an output of every part": all(p.inputs and p.outputs for p in manifest.parts),
        "halos and contexts of at least 0, scales of at least 1": all(
            min(p.halo or 0, p.context) >= 0 and p.scale >= 1 for p in manifest.parts
        ),
        "a geometry of at least 1": min(dataclasses.astuple(g)) >= 1,
        "a shift and a scale for every latent channel": len(channels) == 1,
        "HU and model ranges that ascend": all(
            a < b and math.isfinite(b - a) for a, b in (window, model)
        ),
    }
    return next((wanted for wanted, holds in rules.items() if not holds), None)


def _is_plain(name: str) -> bool:
    """Whether a file of this name lies in the bundle's folder itself."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")
