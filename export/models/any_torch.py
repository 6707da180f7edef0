"""Any torch VAE from its own checkout: a factory is imported, its encode and decode exported.

    --model package.module:factory     called without arguments, returns a torch module with
                                       encode(x) and decode(z) on [1, C, T, H, W]

The network is run as it is, a whole window at a time: nothing is folded, no state is carried.
What encode and decode return may be a tensor, diffusers' output object, a distribution (its
mode is taken) or a tuple that begins with one of them.

Each stage has a network of its own, without the weights that the other one needs alone, so
that the bundle holds each weight once. Which weights a stage needs is seen by running it.

Importing the factory runs the user's own code; weights are only ever read as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from fvae_deploy.export.manifest import Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.foreign import DIRECTIONS, build, call, load_weights

PROBE = (32, 64)  # pixels along H and W of the first clip that a network sees
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
NOISE = 1e-4  # two runs on one clip may differ by rounding, as a share of the largest value


class Stage(nn.Module):
    """Encoder or decoder of a foreign network, as one function of a whole window.

    Gray: encode replicates one channel to `channels`, decode takes their mean.
    """

    def __init__(self, network: nn.Module, direction: str, channels: int, gray: bool) -> None:
        super().__init__()
        self.network, self.direction = network, direction
        self.channels, self.gray = channels, gray

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Frames x [1, C, T, H, W] -> (latents [1, D, t, h, w],), or back."""
        with _Heads():
            return (self.encode(x) if self.direction == "encode" else self.decode(x),)

    def encode(self, x: Tensor) -> Tensor:
        """Replicate and encode."""
        if self.gray:
            x = x.repeat(1, self.channels, 1, 1, 1)
        return call(self.network, "encode", x)

    def decode(self, z: Tensor) -> Tensor:
        """Undo it."""
        x = call(self.network, "decode", z)
        return x.mean(1, keepdim=True) if self.gray else x


class _Heads(TorchFunctionMode):
    """Gives attention over [B, N, C] the axis of heads that the ONNX exporter wants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(ATTENTION, args, strict=False)) | (kwargs or {})
        if given["query"].ndim != 3:
            return func(**given)
        wide = {k: v[:, None] if getattr(v, "ndim", 0) == 3 else v for k, v in given.items()}
        return func(**wide)[:, 0]


def load(
    factory: str,
    weights: Path | None = None,
    *,
    window: int = 65,
    intensity: tuple[float, float] = (-1.0, 1.0),
    channels: int | None = None,
) -> tuple[Model, Source]:
    """Import a factory, build its network, load its weights and find its geometry.

    Parameters
    ----------
    factory
        "package.module:callable", found on sys.path with the current directory in front.
    weights
        .safetensors, or a checkpoint of tensors; None where the factory loads its own.
    window
        Slices that the network takes at once.
    intensity
        What -1000 and 1000 HU become.
    channels
        1 for gray; None for the network's own number.

    Raises
    ------
    UsageError
        For numbers outside their range.
    BundleError
        For a factory, weights or a network that do not fit, with what does not.
    """
    _check_numbers(window, intensity)
    encoder, decoder = _twice(factory)
    source = Source(factory, "", "")
    if weights is not None:
        load_weights(encoder, weights, factory)
        source = Source(weights.name, "", sha256(weights))
    decoder.load_state_dict(encoder.state_dict())
    inside, geometry = _geometry(encoder, window, intensity, channels)
    stages = _stages((encoder, decoder), inside, geometry)
    without = {name: _unused(stages[name], geometry) for name in DIRECTIONS}
    _keep_needed(stages, without, values=True)
    return Model(
        network=Network("any_torch", {"factory": factory, "channels": inside, "without": without}),
        geometry=geometry,
        intensity=Intensity(-1000.0, 1000.0, *intensity),
        latent=LatentNormalisation(
            (0.0,) * geometry.latent_channels, (1.0,) * geometry.latent_channels
        ),
        stages=stages,
        kinds=("first",),
        foreign=True,
    ), source


def rebuild(
    config: Mapping[str, Any], geometry: Geometry, latent: LatentNormalisation
) -> dict[str, nn.Module]:
    """Import the factory again and build the stages, weights to be loaded.

    Raises EngineError where the factory cannot be imported or called.
    """
    try:
        with torch.device("cpu"):  # what is no weight must have its values
            networks = _twice(str(config["factory"]))
            stages = _stages(networks, config["channels"], geometry)
    except BundleError as error:
        raise EngineError(
            f"{error}. Only the engine torch needs that code: --engine openvino and onnxruntime "
            "do not"
        ) from error
    _keep_needed(stages, config["without"], values=False)
    return dict(stages)


def _check_numbers(window: int, intensity: tuple[float, float]) -> None:
    low, high = intensity
    if window < 1:
        raise UsageError(f"expected a window of at least 1 slice, found {window}")
    if not (low < high and math.isfinite(high - low)):
        raise UsageError(f"expected a range that ascends, like -1,1, found {low:g},{high:g}")


def _twice(factory: str) -> tuple[nn.Module, nn.Module]:
    """Build encoder and decoder: a copy would not do, functions may hold on to their network."""
    encoder, decoder = build(factory), build(factory)
    if {id(m) for m in encoder.modules()} & {id(m) for m in decoder.modules()}:
        raise BundleError(f"expected a new network of every call of {factory}, found the same one")
    return encoder, decoder


def _geometry(
    network: nn.Module, window: int, intensity: tuple[float, float], channels: int | None
) -> tuple[int, Geometry]:
    """Run a small clip through; returns the network's own channels and the geometry."""
    inside, x, z = _first_clip(network, window, intensity)
    if z.ndim != 5 or z.shape[0] != 1:
        raise BundleError(f"expected latents [1, D, t, h, w] of encode, found {list(z.shape)}")
    spatial = PROBE[0] // max(1, z.shape[3])
    if (spatial * z.shape[3], spatial * z.shape[4]) != PROBE:
        raise BundleError(
            f"expected latents whose cells are whole squares of pixels, found {z.shape[3]}x"
            f"{z.shape[4]} for slices of {PROBE[0]}x{PROBE[1]}"
        )
    temporal = _temporal(window, z.shape[2])
    if temporal is None:
        raise BundleError(
            f"expected a whole number of slices a latent frame, found {z.shape[2]} frames for "
            f"{window} slices: choose another --window"
        )
    again = call(network, "encode", x)
    if (again - z).abs().max() > NOISE * z.abs().max():
        raise BundleError(
            "expected encode to return the same twice, found a random draw: make the factory "
            "return the mean"
        )
    y = call(network, "decode", z)
    if y.shape[2:3] != x.shape[2:3] and y.ndim == 5:
        raise BundleError(
            f"expected the {window} slices of the window back from decode, found {y.shape[2]}: "
            f"try --window {y.shape[2]}"
        )
    if y.shape != x.shape:
        raise BundleError(f"expected {list(x.shape)} of decode, found {list(y.shape)}")
    return inside, Geometry(
        temporal=temporal,
        spatial=spatial,
        latent_channels=z.shape[1],
        channels=channels or inside,
        window=window,
        first_slices=window,
        first_frames=z.shape[2],
    )


def _first_clip(
    network: nn.Module, window: int, intensity: tuple[float, float]
) -> tuple[int, Tensor, Tensor]:
    """Find whether a network takes colour or gray; returns channels, a clip and its latents."""
    low, high = intensity
    seeded = torch.Generator().manual_seed(0)
    clip = low + (high - low) * torch.rand((1, 3, window, *PROBE), generator=seeded)
    refusals = []
    for channels in (3, 1):
        x = clip[:, :channels].clone()
        try:
            with torch.no_grad():
                return channels, x, call(network, "encode", x)
        except BundleError as error:
            refusals.append(error)
    raise refusals[0]


def _temporal(slices: int, frames: int) -> int | None:
    """Slices of a latent frame: n frames of t slices, or one slice and n - 1 frames of t."""
    found = [slices // frames] if frames and slices % frames == 0 else []
    if frames > 1 and (slices - 1) % (frames - 1) == 0:
        found.append((slices - 1) // (frames - 1))
    # 9 slices to 3 frames may be 3 or 4 slices each: networks halve.
    return min(found, key=lambda n: n & (n - 1) != 0, default=None)


def _stages(
    networks: tuple[nn.Module, nn.Module], channels: int, geometry: Geometry
) -> dict[str, Stage]:
    gray = geometry.channels < channels
    return {
        name: Stage(one, name, channels, gray).eval().requires_grad_(False)
        for name, one in zip(DIRECTIONS, networks, strict=True)
    }


class _Used(TorchDispatchMode):
    """Notes the memory of every tensor that an operation reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        self.places |= {_place(t) for t in given if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unused(stage: Stage, geometry: Geometry) -> list[str]:
    """Name the modules and tensors of a stage's network that a run leaves aside."""
    g, (h, w) = geometry, (side // geometry.spatial for side in PROBE)
    shape = (
        (1, g.channels, g.window, *PROBE)
        if stage.direction == "encode"
        else (1, g.latent_channels, g.first_frames, h, w)
    )
    with torch.no_grad(), _Used() as used:
        stage(torch.zeros(shape))
    tensors = stage.network.state_dict()
    needed = {
        prefix
        for name, tensor in tensors.items()
        if _place(tensor) in used.places
        for prefix in _prefixes(name)
    }
    if not needed:
        raise BundleError(
            f"expected weights that {stage.direction} uses, found none: the VAE must be the module "
            "that the factory returns, or an attribute of it"
        )
    return list(
        dict.fromkeys(
            next(prefix for prefix in _prefixes(name) if prefix not in needed)
            for name in tensors
            if name not in needed
        )
    )


def _prefixes(name: str) -> Iterator[str]:
    """Split "a.b.c" into "a", "a.b" and "a.b.c"."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _keep_needed(
    stages: Mapping[str, Stage], without: Mapping[str, Sequence[str]], values: bool
) -> None:
    """Take from each stage the weights that it does not need, and from the others the values."""
    for direction, stage in stages.items():
        dropped = set(without[direction])
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
