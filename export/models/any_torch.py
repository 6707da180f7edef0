"""Export any torch VAE from its own code: import a factory, export the result's encode and decode.

    --model package.module:factory     called without arguments, returns a torch module with
                                       encode(x) and decode(z) on [1, C, T, H, W]

The network runs unchanged, a whole window at a time: nothing is folded, and there is no state.
Where the factory sets `as_stream = True` on it, its graph is turned into a causal stream with the
same results (export/cut/causal.py); windows stay its default protocol.

encode and decode may return a tensor, an output object of diffusers, a distribution (its mode is
taken) or a tuple that begins with one of these.

Each stage has its own copy of the network, without the weights that it does not use, so that the
bundle holds each weight only once. A run shows which weights a stage uses.

Importing the factory runs the user's own code; weights are only read as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvae_deploy.errors import BundleError, EngineError, UsageError
from fvae_deploy.export.bundle import Network, Source, sha256
from fvae_deploy.export.cut.causal import AheadStage, Pace, Stream, find_streams, same_streams
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.foreign import DIRECTIONS, build, call, load_weights

PROBE = (32, 64)  # height and width of the clip for the first run, in pixels
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
UNKNOWN = 1 << 16  # latent frames: a stream is entered at its start alone
NOISE = 1e-4  # allowed rounding difference of two equal runs, relative to the largest value


class Stage(nn.Module):
    """Encoder or decoder of a foreign network, as a function of a whole window.

    With `gray`, encode replicates one channel to `channels`, and decode takes their mean.
    """

    def __init__(self, network: nn.Module, direction: str, channels: int, gray: bool) -> None:
        super().__init__()
        self.network, self.direction = network, direction
        self.channels, self.gray = channels, gray

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map frames x [1, C, T, H, W] to (latents [1, D, t, h, w],), or back."""
        with _AddHeadAxis():
            return (self.encode(x) if self.direction == "encode" else self.decode(x),)

    def encode(self, x: Tensor) -> Tensor:
        """Replicate the channel if gray, and encode."""
        if self.gray:
            x = x.repeat(1, self.channels, 1, 1, 1)
        return call(self.network, "encode", x)

    def decode(self, z: Tensor) -> Tensor:
        """Decode, and average the channels if gray."""
        x = call(self.network, "decode", z)
        return x.mean(1, keepdim=True) if self.gray else x


class _AddHeadAxis(TorchFunctionMode):
    """Adds the axis of heads, which the ONNX exporter requires, to attention over [B, N, C]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        arguments = dict(zip(ATTENTION, args, strict=False)) | (kwargs or {})
        if arguments["query"].ndim != 3:
            return func(**arguments)
        with_heads = {
            k: v[:, None] if getattr(v, "ndim", 0) == 3 else v for k, v in arguments.items()
        }
        return func(**with_heads)[:, 0]


def load(
    factory: str,
    weights: Path | None = None,
    *,
    window: int = 65,
    intensity: tuple[float, float] = (-1.0, 1.0),
    channels: int | None = None,
) -> tuple[Model, Source]:
    """Import a factory, build its network, load its weights and determine its geometry.

    Parameters
    ----------
    factory
        "package.module:callable", found on sys.path with the current directory in front.
    weights
        .safetensors, or a checkpoint of tensors; None if the factory loads its own.
    window
        Number of slices that the network takes at once.
    intensity
        Model values for -1000 and 1000 HU.
    channels
        1 for gray; None for the network's own number.

    Raises
    ------
    UsageError
        For numbers outside their range.
    BundleError
        For a factory, weights or a network that cannot be exported, with the reason.
    """
    _check_numbers(window, intensity)
    encoder, decoder = _build_pair(factory)
    source = Source(factory, "", "")
    if weights is not None:
        load_weights(encoder, weights, factory)
        source = Source(weights.name, "", sha256(weights))
    decoder.load_state_dict(encoder.state_dict())
    own_channels, geometry = _geometry(encoder, window, intensity, channels)
    stages = _stages((encoder, decoder), own_channels, geometry)
    unused = {name: _unused(stages[name], geometry) for name in DIRECTIONS}
    _drop_unused(stages, unused, values=True)
    config: dict[str, Any] = {"factory": factory, "channels": own_channels, "without": unused}
    found = _streams(stages, geometry) if getattr(encoder, "as_stream", None) is True else {}
    lags = {name: stage.lag for name, stage in found.items() if isinstance(stage, AheadStage)}
    if found:
        config |= {"causal": True, "ahead": list(lags)}
        geometry = replace(geometry, first_slices=1, first_frames=1, published="windows")
    return Model(
        network=Network("any_torch", config),
        geometry=geometry,
        intensity=Intensity(-1000.0, 1000.0, *intensity),
        latent=LatentNormalisation(
            (0.0,) * geometry.latent_channels, (1.0,) * geometry.latent_channels
        ),
        stages=found or stages,
        kinds=("first", "step") if found else ("first",),
        foreign=True,
        context=UNKNOWN if found else None,
        lags=lags,
    ), source


def rebuild(
    config: Mapping[str, Any],
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Import the factory again and build the stages, without weights.

    Raises EngineError if the factory cannot be imported or called.
    """
    try:
        with torch.device("cpu"):  # tensors that are not weights need their values
            networks = _build_pair(str(config["factory"]))
            stages = _stages(networks, config["channels"], geometry)
            found = {}
            if config.get("causal"):
                found = same_streams(_paced(stages, geometry), config.get("ahead", ()))
    except BundleError as error:
        raise EngineError(
            f"{error}. Only the engine torch needs this code: use --engine openvino or onnxruntime"
        ) from error
    _drop_unused(stages, config["without"], values=False)
    return dict(found or stages)


def _check_numbers(window: int, intensity: tuple[float, float]) -> None:
    low, high = intensity
    if window < 1:
        raise UsageError(
            f"expected a window of at least 1 slice, found {window}: choose a larger --window"
        )
    if not (low < high and math.isfinite(high - low)):
        raise UsageError(
            f"expected an ascending range like -1,1, found {low:g},{high:g}: correct --range"
        )


def _build_pair(factory: str) -> tuple[nn.Module, nn.Module]:
    """Call the factory twice, for encoder and decoder.

    Copying one network would not work: functions may refer to the original.
    """
    encoder, decoder = build(factory), build(factory)
    if {id(m) for m in encoder.modules()} & {id(m) for m in decoder.modules()}:
        raise BundleError(
            f"expected a new network from every call of {factory}, found the same one: build it "
            "in the factory"
        )
    return encoder, decoder


def _geometry(
    network: nn.Module, window: int, intensity: tuple[float, float], channels: int | None
) -> tuple[int, Geometry]:
    """Encode and decode a small clip; returns the network's own channels and the geometry."""
    own_channels, x, z = _first_clip(network, window, intensity)
    if z.ndim != 5 or z.shape[0] != 1:
        raise BundleError(
            f"expected latents [1, D, t, h, w] from encode, found {list(z.shape)}: reshape them in "
            "the factory"
        )
    spatial = PROBE[0] // max(1, z.shape[3])
    if (spatial * z.shape[3], spatial * z.shape[4]) != PROBE:
        raise BundleError(
            f"expected latents whose cells are whole squares of pixels, found {z.shape[3]}x"
            f"{z.shape[4]} for slices of {PROBE[0]}x{PROBE[1]}: this network cannot be exported"
        )
    temporal = _temporal(window, z.shape[2])
    if temporal is None:
        raise BundleError(
            f"expected a whole number of slices per latent frame, found {z.shape[2]} frames for "
            f"{window} slices: choose another --window"
        )
    again = call(network, "encode", x)
    if (again - z).abs().max() > NOISE * z.abs().max():
        raise BundleError(
            "expected encode to return the same result twice, found a random draw: return the mean "
            "in the factory"
        )
    y = call(network, "decode", z)
    if y.shape[2:3] != x.shape[2:3] and y.ndim == 5:
        raise BundleError(
            f"expected decode to return the {window} slices of the window, found {y.shape[2]}: "
            f"try --window {y.shape[2]}"
        )
    if y.shape != x.shape:
        raise BundleError(
            f"expected {list(x.shape)} from decode, found {list(y.shape)}: adapt it in the factory"
        )
    return own_channels, Geometry(
        temporal=temporal,
        spatial=spatial,
        latent_channels=z.shape[1],
        channels=channels or own_channels,
        window=window,
        first_slices=window,
        first_frames=z.shape[2],
    )


def _first_clip(
    network: nn.Module, window: int, intensity: tuple[float, float]
) -> tuple[int, Tensor, Tensor]:
    """Try 3 channels, then 1; returns the number that works, a clip and its latents."""
    low, high = intensity
    seeded = torch.Generator().manual_seed(0)
    clip = low + (high - low) * torch.rand((1, 3, window, *PROBE), generator=seeded)
    errors = []
    for channels in (3, 1):
        x = clip[:, :channels].clone()
        try:
            with torch.no_grad():
                return channels, x, call(network, "encode", x)
        except BundleError as error:
            errors.append(error)
    raise errors[0]


def _temporal(slices: int, frames: int) -> int | None:
    """Return the slices per latent frame t, or None if there is no whole number.

    The frames stand for t slices each, or the first for one slice and the others for t each.
    """
    candidates = [slices // frames] if frames and slices % frames == 0 else []
    if frames > 1 and (slices - 1) % (frames - 1) == 0:
        candidates.append((slices - 1) // (frames - 1))
    # 9 slices to 3 frames may be 3 or 4 slices each. Networks halve, so prefer a power of 2.
    return min(candidates, key=lambda n: n & (n - 1) != 0, default=None)


def _stages(
    networks: tuple[nn.Module, nn.Module], channels: int, geometry: Geometry
) -> dict[str, Stage]:
    gray = geometry.channels < channels
    return {
        name: Stage(network, name, channels, gray).eval().requires_grad_(False)
        for name, network in zip(DIRECTIONS, networks, strict=True)
    }


def _paced(stages: Mapping[str, Stage], geometry: Geometry) -> list[tuple[str, Stage, Pace]]:
    """Return both stages with their names and data."""
    g = geometry
    return [
        (name, stages[name], Pace(name == "encode", count, g.spatial, g.temporal))
        for name, count in zip(DIRECTIONS, (g.channels, g.latent_channels), strict=True)
    ]


def _streams(stages: Mapping[str, Stage], geometry: Geometry) -> dict[str, Stream]:
    """Return both stages as streams; raises BundleError if one of them is no stream."""
    g = geometry
    frames = (g.window - 1) // g.temporal + 1
    whole = (g.window - 1) % g.temporal == 0 and (g.first_slices == 1 or g.first_frames == frames)
    reason = f"a window of {g.window} slices, not of 1 + {g.temporal} n"
    found: dict[str, Stream] = {}
    if g.temporal > 1 and g.window > 1 and whole:
        found, reason = find_streams(_paced(stages, g), frames)
    if not found:
        raise BundleError(
            f"expected a network that is a stream in time, since its factory sets as_stream, found "
            f"{reason}: remove as_stream from the factory"
        )
    return found


class _ReadTracker(TorchDispatchMode):
    """Records the memory address of every tensor that an operation reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tree_leaves((args, kwargs))
        self.addresses |= {_address(t) for t in inputs if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unused(stage: Stage, geometry: Geometry) -> list[str]:
    """Return the names of the modules and tensors of a stage's network that a run does not read."""
    g, (h, w) = geometry, (side // geometry.spatial for side in PROBE)
    shape = (
        (1, g.channels, g.window, *PROBE)
        if stage.direction == "encode"
        else (1, g.latent_channels, g.first_frames, h, w)
    )
    with torch.no_grad(), _ReadTracker() as tracker:
        stage(torch.zeros(shape))
    tensors = stage.network.state_dict()
    needed = {
        prefix
        for name, tensor in tensors.items()
        if _address(tensor) in tracker.addresses
        for prefix in _prefixes(name)
    }
    if not needed:
        raise BundleError(
            f"expected weights that {stage.direction} uses, found none: return the VAE itself from "
            "the factory, or a module with the VAE as an attribute"
        )
    return list(
        dict.fromkeys(
            next(prefix for prefix in _prefixes(name) if prefix not in needed)
            for name in tensors
            if name not in needed
        )
    )


def _prefixes(name: str) -> Iterator[str]:
    """Yield "a", "a.b" and "a.b.c" for "a.b.c"."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _drop_unused(
    stages: Mapping[str, Stage], unused: Mapping[str, Sequence[str]], values: bool
) -> None:
    """Remove the weights that each stage does not use; without `values`, empty the others too."""
    for direction, stage in stages.items():
        dropped = set(unused[direction])
        for name, tensor in stage.network.state_dict().items():
            path, _, leaf = name.rpartition(".")
            owner = stage.network.get_submodule(path)
            if dropped.intersection(_prefixes(name)):
                # An empty tensor stays: code may ask for its type or device.
                owner._parameters.pop(leaf, None)
                owner._buffers.pop(leaf, None)
                owner.register_buffer(leaf, tensor.new_empty(0), persistent=False)
            elif not values and leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(tensor.to("meta"), requires_grad=False)
