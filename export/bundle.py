"""The bundle: a folder of graphs that engines open, whatever kind of network is in it.

    manifest.json         a `Bundle` of some kind
    weights.safetensors   the exported weights; the graphs refer into it
    *.onnx                one graph per part; it holds only those weights that the exporter
                          had to transpose or reshape

`Bundle.load` checks kind, schema version, every field's type and every file's sha256. A damaged
bundle, or one of another version, raises an error that names the remedy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from fvae_deploy.errors import BundleError

SCHEMA = 3
FILENAME = "manifest.json"
ORIGIN = "origin.json"  # in a bundle that was pulled from a hub, and in no other

# A part with more multiply-adds per latent cell is heavy: compiling it and allocating its working
# memory again cost little compared with a run, so neither is kept while other parts run.
HEAVY = 5e6

TYPES = ("float32", "int64")
CLOCK = "clock"  # input of parts that look ahead: see `Part`
MIDDLE = (1 << 20, -(1 << 20))  # a clock far from both ends of a stream
SIZE = r"([1-9]\d*\*)?[khwn]|[1-9]\d*"
Dimension = int | str  # 16, or an expression in k, h, w, n: "k", "4*k", "8*h"


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a part; its sizes may depend on k, h, w and n.

    k counts latent frames; h and w count the part's cells (see `Part.scale`); n counts the
    tokens of a text.
    """

    name: str
    shape: tuple[Dimension, ...]
    type: str = "float32"

    def sized(self, k: int = 1, h: int = 1, w: int = 1, n: int = 1) -> tuple[int, ...]:
        """Return the shape for k latent frames of h x w latent cells, and n tokens."""
        symbols = {"k": k, "h": h, "w": w, "n": n}
        sizes = []
        for dimension in self.shape:
            factor, _, symbol = str(dimension).rpartition("*")
            size = symbols[symbol] if symbol in symbols else int(symbol)
            sizes.append(size * int(factor or 1))
        return tuple(sizes)

    def factor(self, symbol: str) -> int:
        """Return this tensor's elements per k, h, w or n; 0 if no dimension depends on it."""
        for dimension in self.shape:
            factor, _, own_symbol = str(dimension).rpartition("*")
            if own_symbol == symbol:
                return int(factor or 1)
        return 0

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Return whether some k, h, w and n of at least 1 give this shape."""
        if len(shape) != len(self.shape):
            return False
        for size, dimension in zip(shape, self.shape, strict=True):
            factor, _, symbol = str(dimension).rpartition("*")
            if symbol not in ("k", "h", "w", "n"):
                if size != int(symbol):
                    return False
            elif size < 1 or size % int(factor or 1):
                return False
        return True


CLOCK_SPEC = TensorSpec(CLOCK, (2,), "int64")


@dataclass(frozen=True)
class Part:
    """One exported graph: a stage of a network, for the first frames, for later ones or for all.

    Parts are named STAGE_first, STAGE_step or STAGE. Stages run in the order of the manifest,
    each on the whole output of the one before; the names of a VAE's stages begin with encode or
    decode. The first input and the first output carry the data; all further ones are state.
    Where a part returns state, its state outputs replace its state inputs, in the same order.

    A part that looks ahead runs every step of a stream, also the first. Its second input is the
    clock, two int64: the steps since the first, and since the one with the last latent frame. With
    these it repeats frames at both ends of the volume. What it returns comes late, by `lag` frames
    since the stream began.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    scale: int  # cells of this part per latent cell, along H and along W alike
    halo: int | None  # reach along H and W in this part's cells; None: it needs the whole plane
    context: int  # reach back in time, in latent frames
    mac_per_cell: int  # multiply-adds per cell of this part and latent frame
    whole: str = ""  # the reason why it needs the whole plane
    maps: bool = False  # all inputs and outputs are data of one step: there is no state
    lag: int = 0  # frames by which results come late, in all stages up to this one

    @property
    def stage(self) -> str:
        """Name of the stage that this part runs."""
        return self.name.removesuffix("_first").removesuffix("_step")

    @property
    def heavy(self) -> bool:
        """Whether a run costs so much that keeping the part ready between runs saves little."""
        return self.maps or self.mac_per_cell * self.scale**2 > HEAVY

    @property
    def state_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs that carry state."""
        return () if self.maps else self.inputs[1 + self.looks_ahead :]

    @property
    def looks_ahead(self) -> bool:
        """Whether results depend on later frames, so that they come late."""
        return len(self.inputs) > 1 and self.inputs[1].name == CLOCK

    @property
    def state_outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs that carry state, in the order of the step part's `state_inputs`."""
        return () if self.maps else self.outputs[1:]


@dataclass(frozen=True)
class Source:
    """Origin of the weights: name, path or hub id, revision and sha256."""

    id: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class Network:
    """What the torch engine needs to rebuild the exported network."""

    family: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """Fields of every bundle's manifest; each kind of bundle adds its own."""

    KIND: ClassVar[str] = ""  # the value of the field `kind`
    USE: ClassVar[str] = ""  # remedy for a user who gave this kind where another was needed

    schema: int
    kind: str
    fvae_version: str
    name: str
    description: str
    licence: str
    source: Source
    network: Network
    precision: str
    parts: tuple[Part, ...]
    files: dict[str, str]
    # Its memory was measured with the norms of large maps summed in two steps, in OpenVINO.
    exact_norms: bool = dataclasses.field(default=False, kw_only=True)

    def part(self, name: str) -> Part:
        """Return the part of that name; raises BundleError when there is none."""
        for part in self.graphs:
            if part.name == name:
                return part
        names = ", ".join(part.name for part in self.parts)
        raise BundleError(
            f"expected a part {name} in bundle {self.name}, found {names}: export the bundle again"
        )

    @property
    def graphs(self) -> tuple[Part, ...]:
        """All parts that have a graph, those of segments included."""
        return self.parts

    @property
    def identity(self) -> str:
        """Short hash of the weights file; latents decode only with the identity they came from."""
        return self.files["weights.safetensors"][:16]

    def rules(self) -> dict[str, bool]:
        """Return what the fields must satisfy besides their types, and whether they do."""
        names = {part.file for part in self.graphs if part.file}
        tensors = [t for part in self.graphs for t in (*part.inputs, *part.outputs)]
        return {
            "a plain name": is_plain(self.name),
            "a sha256 of weights.safetensors": "weights.safetensors" in self.files,
            "a sha256 of every part's file": names <= self.files.keys(),
            "plain file names": all(is_plain(name) for name in self.files),
            "sizes above 0 or like 8*h": all(
                re.fullmatch(SIZE, str(size)) for tensor in tensors for size in tensor.shape
            ),
            f"types among {', '.join(TYPES)}": all(tensor.type in TYPES for tensor in tensors),
            "an input and an output of every part": all(
                p.inputs and p.outputs for p in self.graphs
            ),
            "halos, contexts and lags of at least 0, scales of at least 1": all(
                min(p.halo or 0, p.context, p.lag) >= 0 and p.scale >= 1 for p in self.graphs
            ),
        }

    def save(self, folder: Path) -> None:
        """Write the manifest into the bundle's folder, replacing an old one in one step."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        temporary = folder / f".{FILENAME}"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder / FILENAME)

    @classmethod
    def load(cls, folder: Path, verify: bool = True) -> Self:
        """Read and check a bundle.

        Raises BundleError if the folder holds no bundle, if the manifest has another schema
        version or wrong types, or (with `verify`) if a file's hash differs.
        """
        path = folder / FILENAME
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"expected a bundle at {folder}, found no {FILENAME}: "
                "make one with fvae export, or list the built-in ones with fvae models"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(
                f"expected JSON in {path}, found {error}: export the bundle again"
            ) from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise BundleError(
                f"expected bundle schema {SCHEMA}, found {schema!r:.40} in {path}: export the "
                "bundle again with this version of fvae, or install the version that made it"
            )
        if content.get("kind") != cls.KIND:
            others = {other.KIND: other.USE for other in Bundle.__subclasses__()}
            kind = content.get("kind")
            raise BundleError(
                f"expected a bundle of kind {cls.KIND} at {folder}, found {kind!r:.40}: "
                f"{others.get(str(kind), 'export it again with this version of fvae')}"
            )
        manifest: Self = _parse(cls, content, path, "manifest")
        broken = next((rule for rule, holds in manifest.rules().items() if not holds), None)
        if broken is not None:
            raise BundleError(f"expected {broken} in {path}: export the bundle again")
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """Compare every file's sha256; raises BundleError for the first that differs."""
        pulled = origin_of(folder) is not None
        remedy = "remove the folder and fetch it" if pulled else "export the bundle"
        for name, expected in self.files.items():
            try:
                digest = sha256(folder / name)
            except OSError as error:
                raise BundleError(
                    f"expected {name} in bundle {folder}, found {error.strerror}: {remedy} again"
                ) from None
            if digest != expected:
                raise BundleError(
                    f"expected sha256 {expected[:12]}… of {name} in bundle {folder}, found "
                    f"{digest[:12]}…: the file was changed or damaged, {remedy} again"
                )


def kind_of(folder: Path) -> str:
    """Return the kind in a bundle's manifest, or "" if there is none; nothing else is checked."""
    try:
        return str(json.loads((folder / FILENAME).read_bytes())["kind"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def origin_of(folder: Path) -> str | None:
    """Return from where a bundle was pulled, as hf:OWNER/NAME@COMMIT; None if it was exported."""
    path = folder / ORIGIN
    if not path.exists():
        return None
    try:
        origin = json.loads(path.read_bytes())
        return f"{origin['id']}@{origin['revision']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a hub"  # whatever the file says, it is only written by a pull


def own_files(folder: Path) -> str:
    """Return a pattern of the relative paths of a bundle's files, as its manifest names them.

    Engines that were built for it are among them. Only the list of files is read, so that a bundle
    of another version can be replaced too; of a damaged manifest, only its own name is returned.
    """
    try:
        names = list(map(str, json.loads((folder / FILENAME).read_bytes())["files"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        names = []
    listed = "|".join(map(re.escape, (FILENAME, ORIGIN, *names)))
    return rf"{listed}|engines/\w+/(timings|\w+/[\w.-]+\.(engine|json))"


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(kind: Any, value: Any, path: Path, where: str) -> Any:
    """Rebuild dataclasses from JSON and check the type of every value."""

    def wrong_type() -> BundleError:
        return BundleError(
            f"expected {getattr(kind, '__name__', kind)} at {where} in {path}, found "
            f"{value!r:.40}: export the bundle again"
        )

    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType and any(dataclasses.is_dataclass(a) for a in arguments):
        # An optional dataclass.
        inner = next(a for a in arguments if dataclasses.is_dataclass(a))
        return None if value is None else _parse(inner, value, path, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong_type()
        hints, fields = typing.get_type_hints(kind), {}
        for field in dataclasses.fields(kind):
            if field.name in value:
                fields[field.name] = _parse(
                    hints[field.name], value[field.name], path, f"{where}.{field.name}"
                )
            elif field.default is dataclasses.MISSING:
                raise BundleError(
                    f"expected a field {field.name} at {where} in {path}, found none: "
                    "export the bundle again"
                )
        return kind(**fields)
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong_type()
        return tuple(_parse(arguments[0], item, path, f"{where}[]") for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong_type()
        return {
            str(k): _parse(arguments[1], v, path, f"{where}[{k!r:.40}]") for k, v in value.items()
        }
    allowed = arguments if origin is types.UnionType else (kind,)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise wrong_type() from None
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed):
        raise wrong_type()
    return value


def is_plain(name: str) -> bool:
    """Return whether a name is a plain file name, without a path to another folder."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")
