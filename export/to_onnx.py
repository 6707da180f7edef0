"""Network to bundle: ONNX graphs that share one weights file, and the manifest.

The graphs hold no weights: every initializer points, by offset and length, into
`weights.safetensors` (ONNX external data is any file). So first and step parts share their
weights on disk, the torch engine loads the same bytes, and the bundle is as small as the
network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnxscript.rewriter.rules.common import slice_split_rule
from safetensors.torch import save_file
from torch import nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import SCHEMA, Bundle, Part, Source, TensorSpec, is_plain, sha256
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.probe import parts_of

Kind = TypeVar("Kind", bound=Bundle)

WEIGHTS = "weights.safetensors"
EXAMPLE = {"k": 2, "h": 3, "w": 4, "n": 5}  # sizes traced with; all of them stay symbolic
OTHER = {"k": 3, "h": 5, "w": 7}  # sizes at which the trace of foreign code must hold, too


def export_bundle(
    model: Model,
    folder: Path,
    *,
    name: str,
    description: str,
    licence: str,
    source: Source,
    version: str,
    opset: int = 18,
    progress: Callable[[str], None] = lambda message: None,
    measure: Callable[[Path, Manifest], Manifest] = lambda folder, manifest: manifest,
) -> Manifest:
    """Write a VAE's bundle to `folder`, which appears only when it is whole.

    `opset` is the ONNX operator set, 18 or later; `measure` is `write_bundle`'s. Raises
    BundleError when the folder exists or cannot be written, or the network cannot be cut into
    parts.
    """
    _check_new(folder, name)
    progress("measuring how far each stage reaches")
    manifest = Manifest(
        schema=SCHEMA,
        kind=Manifest.KIND,
        fvae_version=version,
        name=name,
        description=description,
        licence=licence,
        source=source,
        network=model.network,
        precision="fp32",
        parts=parts_of(model),
        files={},
        geometry=model.geometry,
        intensity=model.intensity,
        latent=model.latent,
    )
    return write_bundle(
        manifest,
        model.stages,
        folder,
        opset,
        progress,
        foreign=model.foreign,
        measure=measure,
    )


def write_bundle(
    manifest: Kind,
    stages: Mapping[str, nn.Module],
    folder: Path,
    opset: int = 18,
    progress: Callable[[str], None] = lambda message: None,
    *,
    foreign: bool = False,
    texts: Mapping[str, str] = MappingProxyType({}),
    measure: Callable[[Path, Kind], Kind] = lambda folder, manifest: manifest,
) -> Kind:
    """Write weights, a graph for each part, further files of text, and the manifest.

    `measure` is given the folder before it has its name, and returns the manifest with what it
    found. Returns the manifest with the files' hashes. Raises BundleError as `export_bundle` does.
    """
    _check_new(folder, manifest.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        said = _said(manifest) if foreign else None
        save_file(_weights(stages), temporary / WEIGHTS, said)
        (temporary / WEIGHTS).chmod(0o644)
        offsets = _offsets(temporary / WEIGHTS)
        for number, part in enumerate(manifest.parts):
            progress(f"exporting graph {number + 1} of {len(manifest.parts)}: {part.name}")
            proto = trace(stages[part.stage], part, opset, foreign)
            _point_into(proto, offsets, f"{part.stage}.")
            onnx.save(proto, str(temporary / part.file))
        for file, text in texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        names = [WEIGHTS, *(part.file for part in manifest.parts), *texts]
        files = {name: sha256(temporary / name) for name in names}
        manifest = dataclasses.replace(manifest, files=files)
        manifest.save(temporary)
        type(manifest).load(temporary, verify=False)  # what could not be opened again is refused
        manifest = measure(temporary, manifest)
        manifest.save(temporary)
        temporary.chmod(0o755)
        _check_new(folder, manifest.name)  # another export may have come before
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _check_new(folder: Path, name: str) -> None:
    if not is_plain(name):
        raise BundleError(
            f"expected a plain name of the bundle, found {name!r}: give one as --name"
        )
    if folder.exists():
        raise BundleError(f"expected a new folder, found {folder}: remove it or choose another")
    if not folder.parent.is_dir():
        raise BundleError(f"expected a folder {folder.parent}, found none: create it")


def _said(manifest: Bundle) -> dict[str, str]:
    """Say what latents depend on beside the weights of foreign code: the identity then has it."""
    facts = dataclasses.asdict(manifest)
    return {"fvae": json.dumps({name: facts[name] for name in ("geometry", "intensity", "latent")})}


def _weights(stages: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """All stages' weights by name; one that has two names is written twice."""
    weights: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for stage, network in stages.items():
        for key, value in network.state_dict().items():
            place = value.untyped_storage().data_ptr()
            weights[f"{stage}.{key}"] = value.clone() if place in places else value.contiguous()
            places.add(place)
    return weights


def trace(network: nn.Module, part: Part, opset: int, foreign: bool = False) -> onnx.ModelProto:
    """Export one part with symbolic k, h and w.

    Raises BundleError where the exporter cannot, or where the trace of `foreign` code does
    not hold at other sizes.
    """
    example = [
        torch.zeros(spec.sized(**EXAMPLE), dtype=getattr(torch, spec.type)) for spec in part.inputs
    ]
    used = {s for s in EXAMPLE if any(spec.factor(s) for spec in part.inputs)}
    least = {"k": 2} if part.name == "denoise" else {}  # it reflects at both ends
    symbols = {name: torch.export.Dim(name, min=least.get(name, 1), max=1 << 16) for name in used}
    dynamic = [_dynamic(spec, symbols) for spec in part.inputs]
    try:
        with _quiet(), _without_pairs():
            program = torch.onnx.export(
                network,
                tuple(example),
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in part.inputs],
                output_names=[spec.name for spec in part.outputs],
                # The signature is (data, *state): the state's shapes go as one tuple.
                dynamic_shapes=(dynamic[0], tuple(dynamic[1:])) if dynamic[1:] else (dynamic[0],),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise BundleError(
            f"expected {part.name} to export to ONNX, found {_reason(error)}; "
            "change that code, or see the whole with --debug"
        ) from error
    assert program is not None
    if foreign:
        assert program.exported_program is not None
        _check_trace(network, program.exported_program.module(), part)
    proto: onnx.ModelProto = program.model_proto
    for thing in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        del thing.metadata_props[:]  # source lines of the exporting machine
        thing.doc_string = ""
    return proto


def _reason(error: BaseException) -> str:
    """Tell what the exporter says without its advice: the first line, and where it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in lines[1:] if line.startswith("Caused by")]
    return f"{type(error).__name__}: {'; '.join([*lines[:1], *places[:1]])[:300]}"


def _check_trace(network: nn.Module, traced: nn.Module, part: Part) -> None:
    """Compare network and trace at sizes other than those traced with.

    A loop over the plane is traced with the turns that it took, silently.
    """
    seeded = torch.Generator().manual_seed(0)
    given = [torch.randn(spec.sized(**OTHER), generator=seeded) for spec in part.inputs]
    with torch.no_grad():
        wanted = network(*given)[0]
        try:
            found = traced(*given)[0]
            fits = found.shape == wanted.shape
            fits = fits and bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())
        except (RuntimeError, AssertionError):  # a guard on sizes
            fits = False
    if not fits:
        raise BundleError(
            f"expected a graph of {part.name} for slices of any size, found one that holds at "
            "the size traced with alone: its code decides or loops by height or width; where "
            "that is tiling of its own, switch it off in the factory"
        )


def _dynamic(spec: TensorSpec, symbols: Mapping[str, Any]) -> dict[int, Any]:
    """`{"8*h": 24}` of a spec as torch.export's derived dimensions."""
    dynamic = {}
    for axis, dimension in enumerate(spec.shape):
        factor, _, symbol = str(dimension).rpartition("*")
        if symbol in symbols:
            dynamic[axis] = int(factor) * symbols[symbol] if factor else symbols[symbol]
    return dynamic


@contextlib.contextmanager
def _without_pairs() -> Iterator[None]:
    """Keep the exporter's optimizer from looking at all pairs of nodes for two slices.

    No network here has such a pair. The search took up to half of an export, and hours where
    foreign code is unrolled over a window.
    """
    slice_split_rule.try_rewrite = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (progress lines, graphs, notes) off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _offsets(weights: Path) -> dict[str, tuple[int, int]]:
    """Byte offset and length of every tensor in a safetensors file."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + begin, end - begin) for name, (begin, end) in spans.items()}


def _point_into(
    proto: onnx.ModelProto, offsets: Mapping[str, tuple[int, int]], prefix: str
) -> None:
    """Replace the weights of a graph by references into the weights file."""
    for tensor in proto.graph.initializer:
        found = offsets.get(prefix + tensor.name)
        if found is None:
            continue  # a constant of the graph's own
        offset, length = found
        if len(tensor.raw_data) != length:
            raise BundleError(
                f"expected {length} bytes of {tensor.name} in the graph, found "
                f"{len(tensor.raw_data)}: the exporter changed the weight"
            )
        set_external_data(tensor, WEIGHTS, offset, length)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
