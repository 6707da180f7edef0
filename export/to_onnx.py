"""Network to bundle: four ONNX graphs that share one weights file, and the manifest.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import set_external_data
from safetensors.torch import save_file
from torch import nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.manifest import (
    SCHEMA,
    Geometry,
    Intensity,
    LatentNormalisation,
    Manifest,
    Network,
    Part,
    Source,
    TensorSpec,
    sha256,
)
from fvae_deploy.export.models.lean_vae import PATCH, STATE_FRAMES, STRIDE, LeanVAE, LeanVAEConfig
from fvae_deploy.export.models.lean_vae_parts import lean_vae_parts

WEIGHTS = "weights.safetensors"
WINDOW = 65  # slices: the published protocol
INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-0.5, model_max=0.5)
EXAMPLE = {"k": 2, "h": 3, "w": 4}  # sizes traced with; all three stay symbolic


def export_bundle(
    model: LeanVAE,
    folder: Path,
    *,
    name: str,
    description: str,
    licence: str,
    source: Source,
    version: str,
    channels: int = 1,
    scale: Sequence[float] | None = None,
    opset: int = 18,
) -> Manifest:
    """Write a bundle to `folder`, which appears only when it is whole.

    Parameters
    ----------
    model
        The network with its weights.
    channels
        1 folds replicated input and averaged output of a three-channel network into the
        weights; otherwise the network's own number.
    scale
        One factor per latent channel that brings it to unit deviation; None leaves latents
        as the network makes them.
    opset
        ONNX operator set, 18 or later.

    Raises
    ------
    BundleError
        When the folder exists or cannot be written, or the channels do not fit.
    """
    config = model.config
    if channels not in (1, config.in_channels):
        raise BundleError(
            f"expected 1 or {config.in_channels} channels, found {channels}: use gray or rgb"
        )
    if folder.exists():
        raise BundleError(f"expected a new folder, found {folder}: remove it or choose another")
    if not folder.parent.is_dir():
        raise BundleError(f"expected a folder {folder.parent}, found none: create it")
    scale = list(scale or [1.0] * config.latent_dim)
    encode, decode = lean_vae_parts(config, channels, scale, model.float())
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        weights = {f"encode.{k}": v for k, v in encode.state_dict().items()}
        weights |= {f"decode.{k}": v for k, v in decode.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(0o644)
        offsets = _offsets(temporary / WEIGHTS)
        parts = lean_vae_part_specs(config, channels)
        for part in parts:
            network = encode if part.name.startswith("encode") else decode
            proto = trace(network, part, opset)
            _point_into(proto, offsets, part.name.split("_")[0] + ".")
            onnx.save(proto, str(temporary / part.file))
        manifest = Manifest(
            schema=SCHEMA,
            fvae_version=version,
            name=name,
            description=description,
            licence=licence,
            source=source,
            network=Network("lean_vae", dataclasses.asdict(config)),
            geometry=Geometry(STRIDE, PATCH, config.latent_dim, channels, WINDOW),
            intensity=INTENSITY,
            latent=LatentNormalisation((0.0,) * config.latent_dim, tuple(scale)),
            precision="fp32",
            parts=parts,
            files={f: sha256(temporary / f) for f in [WEIGHTS, *(p.file for p in parts)]},
        )
        manifest.save(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def lean_vae_part_specs(config: LeanVAEConfig, channels: int) -> tuple[Part, ...]:
    """Names, shapes, halos and costs of LeanVAE's four parts."""
    low, high, whole = config.l_dim, config.h_dim, config.embedding_dim
    sep, fusion = config.sep_num_layer, config.fusion_num_layer
    ista = 2 * config.ista_iter_num * config.ista_layer_num
    patch = whole * channels * STRIDE * PATCH * PATCH
    widths = {
        "encode": [low] * sep + [high] * sep + [whole] * fusion,
        "decode": [whole] * (ista + fusion) + [low] * sep + [high] * sep,
    }
    halos = {"encode": config.encoder_layers, "decode": config.decoder_layers}
    latent = TensorSpec("z", (1, config.latent_dim, "k", "h", "w"))
    parts = []
    for direction, states in widths.items():
        inputs = tuple(
            TensorSpec(f"past{i}", (STATE_FRAMES, "h", "w", n)) for i, n in enumerate(states)
        )
        outputs = tuple(
            TensorSpec(f"next{i}", (STATE_FRAMES, "h", "w", n)) for i, n in enumerate(states)
        )
        layers = sum(27 * n + 3 * n * int(4 * (2 / 3) * n) for n in states)
        for kind, frames in (("first", 1), ("step", f"{STRIDE}*k")):
            pixels = TensorSpec("x", (1, channels, frames, f"{PATCH}*h", f"{PATCH}*w"))
            z = dataclasses.replace(latent, shape=(1, config.latent_dim, 1, "h", "w"))
            z = z if kind == "first" else latent
            source, target = (pixels, z) if direction == "encode" else (z, pixels)
            parts.append(
                Part(
                    name=f"{direction}_{kind}",
                    file=f"{direction}_{kind}.onnx",
                    inputs=(source, *(inputs if kind == "step" else ())),
                    outputs=(target, *outputs),
                    halo=halos[direction],
                    context=STATE_FRAMES * halos[direction],
                    mac_per_cell=layers + patch + whole * config.latent_dim,
                )
            )
    return tuple(parts)


def trace(network: nn.Module, part: Part, opset: int) -> onnx.ModelProto:
    """Export one part with symbolic k, h and w."""
    example = [torch.zeros(spec.sized(**EXAMPLE)) for spec in part.inputs]
    symbols = {name: torch.export.Dim(name, min=1, max=1 << 16) for name in EXAMPLE}
    dynamic = [_dynamic(spec, symbols) for spec in part.inputs]
    with _quiet():
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
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    for thing in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        del thing.metadata_props[:]  # source lines of the exporting machine
        thing.doc_string = ""
    return proto


def _dynamic(spec: TensorSpec, symbols: Mapping[str, Any]) -> dict[int, Any]:
    """`{"8*h": 24}` of a spec as torch.export's derived dimensions."""
    dynamic = {}
    for axis, dimension in enumerate(spec.shape):
        factor, _, symbol = str(dimension).rpartition("*")
        if symbol in symbols:
            dynamic[axis] = int(factor) * symbols[symbol] if factor else symbols[symbol]
    return dynamic


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (progress lines, converter notes) off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
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
