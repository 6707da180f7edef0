"""Write a bundle: ONNX graphs that share one weights file, and the manifest.

The graphs hold no weights: every initializer points, by offset and length, into
`weights.safetensors` (ONNX allows any file as external data). So first and step parts share
their weights on disk, the torch engine loads the same bytes, and the bundle is no larger than
the network.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import set_external_data
from safetensors.torch import save_file
from torch import nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Bundle, Part, is_plain, sha256
from fvae_deploy.export.cut.graphs import trace_segments
from fvae_deploy.export.draft import BundleDraft, Kind, LoadedModel, draft_vae
from fvae_deploy.export.exporter import dynamic, plain_proto, run_exporter
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.program import Program

WEIGHTS = "weights.safetensors"
EXAMPLE = {"k": 2, "h": 3, "w": 4, "n": 5}  # sizes for tracing; all of them stay symbolic
OTHER = {"k": 3, "h": 5, "w": 7}  # further sizes, at which the trace of foreign code is checked


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    `opset` is the ONNX operator set, 18 or later. `progress` is called with a line for the user.
    `measure` is called with the bundle's temporary folder and its manifest, before the bundle gets
    its final name, and returns the manifest with the measurements added.
    """

    opset: int = 18
    progress: Callable[[str], None] = lambda message: None
    measure: Callable[[Path, Any], Any] = lambda folder, manifest: manifest


DEFAULTS = ExportOptions()


def export_bundle(
    loaded: LoadedModel, folder: Path, *, version: str, options: ExportOptions = DEFAULTS
) -> Manifest:
    """Write a VAE's bundle to `folder`, which appears only when it is complete.

    `version` is that of fvae. Raises BundleError if the folder exists or cannot be written, or if
    the network cannot be cut into parts.
    """
    _check_new(folder, loaded.name)
    options.progress("measuring the reach of each stage")
    return write_bundle(draft_vae(loaded, version), folder, options)


def write_bundle(draft: BundleDraft[Kind], folder: Path, options: ExportOptions = DEFAULTS) -> Kind:
    """Write weights, a graph for each part, further text files, and the manifest.

    Returns the manifest with the files' hashes and the measurements. Raises BundleError as
    `export_bundle` does.
    """
    manifest = draft.manifest
    _check_new(folder, manifest.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        metadata = _identity_metadata(manifest) if draft.foreign else None
        save_file(_weights(draft.stages), temporary / WEIGHTS, metadata)
        (temporary / WEIGHTS).chmod(0o644)
        offsets = _offsets(temporary / WEIGHTS)
        for number, part in enumerate(manifest.parts):
            options.progress(f"exporting graph {number + 1} of {len(manifest.parts)}: {part.name}")
            proto = trace(draft.stages[part.stage], part, options.opset, draft.foreign)
            _point_into(proto, offsets, f"{part.stage}.")
            onnx.save(proto, str(temporary / part.file))
        for program in manifest.programs if isinstance(manifest, Manifest) else ():
            if program not in getattr(manifest, "programs", ()):
                continue  # the first step could not be exported, so the stage runs whole
            options.progress(f"exporting {len(program.segments)} segments of {program.stage}")
            try:
                _write_segments(draft, program, offsets, temporary, options.opset)
            except BundleError as error:  # the stage still runs whole
                options.progress(f"{program.of} only runs whole: {error}")
                manifest = _without(manifest, program)
        for file, text in draft.texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        names = [WEIGHTS, *(part.file for part in manifest.graphs), *draft.texts]
        files = {name: sha256(temporary / name) for name in names}
        manifest = dataclasses.replace(manifest, files=files)
        manifest.save(temporary)
        type(manifest).load(temporary, verify=False)  # raises if the bundle could not be opened
        manifest = options.measure(temporary, manifest)
        manifest.save(temporary)
        temporary.chmod(0o755)
        _check_new(folder, manifest.name)  # another export may have finished meanwhile
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _write_segments(
    draft: BundleDraft[Kind],
    program: Program,
    offsets: Mapping[str, tuple[int, int]],
    folder: Path,
    opset: int,
) -> None:
    """Write the graphs of a program; raises BundleError, having written none, if one fails."""
    protos = trace_segments(program, draft.segments, opset)
    for proto in protos.values():
        _point_into(proto, offsets, f"{program.of}.")
    for file, proto in protos.items():
        onnx.save(proto, str(folder / file))


def _without(manifest: Any, program: Program) -> Any:
    """Return the manifest of a VAE of which one stage runs whole only."""
    others = tuple(each for each in manifest.programs if each.of != program.of)
    return dataclasses.replace(manifest, programs=others)


def _check_new(folder: Path, name: str) -> None:
    if not is_plain(name):
        raise BundleError(
            f"expected a plain name for the bundle, without / or \\, found {name!r}: give one "
            "with --name"
        )
    if folder.exists():
        raise BundleError(f"expected a new folder, found {folder}: remove it or choose another")
    if not folder.parent.is_dir():
        raise BundleError(f"expected a folder {folder.parent}, found none: create it")


def _identity_metadata(manifest: Bundle) -> dict[str, str]:
    """Return geometry, intensity and normalisation as metadata of the weights file.

    Latents of foreign code depend on them too, and the bundle's identity hashes that file.
    """
    fields = dataclasses.asdict(manifest)
    facts = {name: fields[name] for name in ("geometry", "intensity", "latent")}
    return {"fvae": json.dumps(facts)}


def _weights(stages: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return all stages' weights by name; a tensor with two names is copied for the second."""
    weights: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()
    for stage, network in stages.items():
        for key, value in network.state_dict().items():
            address = value.untyped_storage().data_ptr()
            shared = address in addresses
            weights[f"{stage}.{key}"] = value.clone() if shared else value.contiguous()
            addresses.add(address)
    return weights


def trace(network: nn.Module, part: Part, opset: int, foreign: bool = False) -> onnx.ModelProto:
    """Export one part to ONNX with symbolic k, h, w and n.

    Raises BundleError if the exporter fails, or if the trace of `foreign` code is wrong at other
    sizes.
    """
    example = [
        torch.zeros(spec.sized(**EXAMPLE), dtype=getattr(torch, spec.type)) for spec in part.inputs
    ]
    used = {s for s in EXAMPLE if any(spec.factor(s) for spec in part.inputs)}
    least = {"k": 2} if part.name == "denoise" else {}  # its window is reflected at both ends
    symbols = {name: torch.export.Dim(name, min=least.get(name, 1), max=1 << 16) for name in used}
    shapes = [dynamic(spec, symbols) for spec in part.inputs]
    program = run_exporter(
        network,
        tuple(example),
        part.name,
        opset=opset,
        input_names=[spec.name for spec in part.inputs],
        output_names=[spec.name for spec in part.outputs],
        # The signature is (data, *state), so the states' shapes are one tuple.
        dynamic_shapes=(shapes[0], tuple(shapes[1:])) if shapes[1:] else (shapes[0],),
    )
    if foreign:
        assert program.exported_program is not None
        _check_trace(network, program.exported_program.module(), part)
    return plain_proto(program)


def _check_trace(network: nn.Module, traced: nn.Module, part: Part) -> None:
    """Compare network and trace at sizes other than those used for tracing.

    A loop over the plane is traced, without a warning, with the number of turns that it took.
    """
    seeded = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(spec.sized(**OTHER), generator=seeded)
        if spec.type == "float32"
        else torch.zeros(spec.sized(**OTHER), dtype=getattr(torch, spec.type))
        for spec in part.inputs
    ]
    with torch.no_grad():
        expected = network(*inputs)[0]
        try:
            result = traced(*inputs)[0]
            fits = result.shape == expected.shape
            fits = fits and bool((result - expected).abs().max() <= 1e-4 * expected.abs().max())
        except (RuntimeError, AssertionError):  # a guard on sizes
            fits = False
    if not fits:
        raise BundleError(
            f"expected a graph of {part.name} for slices of any size, found one that is right "
            "only at the traced size: its code branches or loops over height or width; if that "
            "is tiling of its own, switch it off in the factory"
        )


def _offsets(weights: Path) -> dict[str, tuple[int, int]]:
    """Return the byte offset and length of every tensor in a safetensors file."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + begin, end - begin) for name, (begin, end) in spans.items()}


def _point_into(
    proto: onnx.ModelProto, offsets: Mapping[str, tuple[int, int]], prefix: str
) -> None:
    """Replace the weights in a graph by references into the weights file."""
    for tensor in proto.graph.initializer:
        span = offsets.get(prefix + tensor.name)
        if span is None:
            continue  # a constant of the graph itself
        offset, length = span
        if len(tensor.raw_data) != length:
            raise BundleError(
                f"expected {length} bytes of {tensor.name} in the graph, found "
                f"{len(tensor.raw_data)}: the exporter changed the weight"
            )
        set_external_data(tensor, WEIGHTS, offset, length)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
