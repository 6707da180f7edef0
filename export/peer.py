"""Peers for `fvae bench`: the same weights, run by the authors' own implementations.

`reference`: LeanVAE in the published formulation. Eager torch, a whole window at once; tokens
are channels last in memory, and every 3-D depthwise convolution permutes them to channels first,
pads explicitly and permutes back; Haar bands come from strided convolutions.

`reference` of a tiny autoencoder: its two sequences of layers in eager torch, slices as a batch.

`diffusers` and `diffusers tiling`: a diffusers VAE through its own `encode` and `decode`, in
eager torch, without and with its `enable_tiling`.

Nothing is folded. The results equal those of the exported parts (tests check this), except at
the blended seams of diffusers' tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export import author_files
from fvae_deploy.export.bundle import sha256
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.models.diffusers_family import WEIGHTS
from fvae_deploy.export.models.lean_vae import CausalDepthwise, CausalState, LeanVAE
from fvae_deploy.export.sources import load, load_lean_vae
from fvae_deploy.kernels.dispatch import compute_in_float32

REFERENCE, DIFFUSERS, TILING = "reference", "diffusers", "diffusers tiling"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peers(weights: Path) -> tuple[str, ...]:
    """Return the names of the peers that can run these weights."""
    tiny = author_files.find(weights) is not None
    return (DIFFUSERS, TILING) if weights.is_dir() and not tiny else (REFERENCE,)


def check_peer(weights: Path, manifest: Manifest) -> None:
    """Raise BundleError unless the bundle was made from these weights, by hash or by geometry."""
    tiny = author_files.find(weights)
    file = weights / WEIGHTS if weights.is_dir() else weights
    if tiny is None and not file.is_file():
        raise BundleError(f"expected a peer's weights at {file}, found nothing: check --peer")
    source = manifest.source
    if source.sha256:
        if (sha256(file) if tiny is None else tiny.sha256) != source.sha256:
            raise BundleError(
                f"expected the weights that {manifest.name} was exported from ({source.id}, sha256 "
                f"{source.sha256[:12]}…) for --peer, found others in {weights}: give those weights"
            )
        return
    channels = "published" if manifest.geometry.channels == 1 else "rgb"
    geometry = load(str(weights), channels=channels).model.geometry
    if geometry != manifest.geometry:
        raise BundleError(
            f"expected a peer with {manifest.geometry}, found {geometry} in {weights}: give the "
            f"weights of {manifest.name}"
        )


def peer_window(
    weights: Path,
    peer: str,
    direction: str,
    x: NDArray[np.float32],
    precision: str,
    device: str = "cpu",
    *,
    gray: bool = True,
    limits: tuple[float, float] | None = None,
) -> Callable[[], NDArray[np.float32]]:
    """Return a function that passes one clip or latent through a peer.

    x is a clip [C, T, H, W] in the model's range, or latents [D, t, h, w] normalised like the
    bundle's. A gray clip is replicated to the network's channels, as the published scripts do. The
    function returns what the bundle returns: latents [D, t, h, w], or frames [C, T, H, W]; with
    `limits`, the model's range, they are clamped to it, as the published scripts do; with `gray`
    they are then averaged over the channels.
    """
    if device != "cpu":
        compute_in_float32()
    dtype = DTYPES[precision]
    network, channels, encode, decode = (
        _published(weights) if peer == REFERENCE else _diffusers(weights, peer == TILING)
    )
    network.to(device, dtype)
    window = torch.from_numpy(x)[None]
    if direction == "encode":
        window = window.repeat(1, channels // x.shape[0], 1, 1, 1)

    @torch.inference_mode()
    def run() -> NDArray[np.float32]:
        data = window.to(device, dtype)
        y: Tensor = encode(data) if direction == "encode" else decode(data)
        if direction == "decode":
            y = y if limits is None else y.clamp(*limits)
            y = y.mean(1, keepdim=True) if gray else y
        return y[0].float().cpu().numpy()

    return run


# The network, its channels, and its encode and decode.
Coders = tuple[nn.Module, int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _published(weights: Path) -> Coders:
    """Load a LeanVAE in the published formulation, and scale latents as the bundle does."""
    if files := author_files.find(weights):
        return _tiny(files)
    loaded, metadata = load_lean_vae(weights)
    model = Published(loaded).eval()
    scale = torch.tensor(metadata.get("latent_scale", 1.0)).view(-1, 1, 1, 1)
    return (
        model,
        model.config.in_channels,
        lambda x: model.encode(x) * scale.to(x),
        lambda z: model.decode(z / scale.to(z)),
    )


def _tiny(files: author_files.AuthorFiles) -> Coders:
    """Load a tiny autoencoder as its author runs it, for slices in [-1, 1]."""
    model = author_files.load(files)

    def encode(x: Tensor) -> Tensor:
        return model.encode((x[0].transpose(0, 1) + 1) / 2).transpose(0, 1)[None]

    def decode(z: Tensor) -> Tensor:
        return (2 * model.decode(z[0].transpose(0, 1)) - 1).transpose(0, 1)[None]

    return model, model.config["encoder"][0][1], encode, decode


def _diffusers(folder: Path, tiling: bool) -> Coders:
    """Load a VAE as a user of diffusers does, and normalise latents as its pipelines do."""
    from diffusers import AutoencoderKLWan, AutoModel

    model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    if tiling:
        model.enable_tiling()
    config = model.config
    if "latents_mean" in model.state_dict():  # LTX keeps them with the weights
        factor = config.scaling_factor
        shift, scale = (
            values.view(1, -1, 1, 1, 1)
            for values in (model.latents_mean, factor / model.latents_std)
        )
    elif hasattr(config, "latents_mean") and config.latents_mean is not None:
        shift, scale = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, [1 / v for v in config.latents_std])
        )
    else:
        shift, scale = (
            torch.tensor(value or 0.0).view(1, 1, 1, 1, 1)
            for value in (getattr(config, "shift_factor", 0.0), config.scaling_factor)
        )
    slicewise = next(model.parameters()).ndim == 4  # a 2-D network: slices are the batch

    def encode(x: Tensor) -> Tensor:
        x = x[0].transpose(0, 1) if slicewise else x
        output = model.encode(x)
        z = output.latent_dist.mean if hasattr(output, "latent_dist") else output.latents
        z = z.transpose(0, 1)[None] if slicewise else z
        normalised: Tensor = (z - shift.to(z)) * scale.to(z)
        return normalised

    def decode(z: Tensor) -> Tensor:
        z = z / scale.to(z) + shift.to(z)
        x: Tensor = model.decode(z[0].transpose(0, 1) if slicewise else z).sample
        return x.transpose(0, 1)[None] if slicewise else x

    channels = getattr(config, "in_channels", None) or config.input_channels
    if isinstance(model, AutoencoderKLWan):  # it counts the pixels of a patch as channels
        channels //= (config.patch_size or 1) ** 2
    return model, channels, encode, decode


class PublishedDepthwise(nn.Module):
    """The depthwise layer as published: permute, pad, 3-D convolution, permute back."""

    def __init__(self, layer: CausalDepthwise) -> None:
        super().__init__()
        self.ds_conv = layer.ds_conv

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        """Convolve x [B, T, H, W, D], a whole window; the state is not used."""
        padded = F.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
        convolved: Tensor = self.ds_conv(padded.contiguous())
        return convolved.permute(0, 2, 3, 4, 1)


def _haar_along(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Add and subtract neighbours of x [B, C, T, H, W] along one axis, by convolutions."""
    shape, stride = [1, 1, 1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis - 2] = 2, 2
    groups = x.shape[1]
    kernels = [
        x.new_tensor(taps).reshape(shape).repeat(groups, 1, 1, 1, 1)
        for taps in ((1.0, 1.0), (1.0, -1.0))
    ]
    low, high = (F.conv3d(x, kernel, stride=tuple(stride), groups=groups) for kernel in kernels)
    return low, high


def _inverse_haar_along(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """Invert `_haar_along` by transposed convolutions."""
    shape, stride = [1, 1, 1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis - 2] = 2, 2
    groups = low.shape[1]
    first, second = (
        low.new_tensor(taps).reshape(shape).repeat(groups, 1, 1, 1, 1) / 2
        for taps in ((1.0, 1.0), (1.0, -1.0))
    )
    y: Tensor = F.conv_transpose3d(low, first, stride=tuple(stride), groups=groups)
    y += F.conv_transpose3d(high, second, stride=tuple(stride), groups=groups)
    return y


def published_haar(x: Tensor) -> Tensor:
    """Compute `haar` axis by axis and band by band, with strided grouped convolutions."""
    bands = [x]
    for axis in (4, 3) if x.shape[2] == 1 else (2, 3, 4):
        bands = [half for band in bands for half in _haar_along(band, axis)]
    return torch.cat(bands, dim=1)


def published_inverse_haar(bands: Tensor, channels: int) -> Tensor:
    """Compute `inverse_haar` with transposed convolutions."""
    parts = list(torch.split(bands, channels, dim=1))
    for axis in (3, 4) if len(parts) == 4 else (4, 3, 2):
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [_inverse_haar_along(low, high, axis) for low, high in pairs]
    return parts[0]


class Published(LeanVAE):
    """`LeanVAE` in the published formulation; its results are the same."""

    def __init__(self, model: LeanVAE) -> None:
        super().__init__(model.config)
        self.load(model.state_dict())
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, CausalDepthwise):
                    setattr(module, name, PublishedDepthwise(child))

    def bands(self, x: Tensor) -> Tensor:
        """Compute the wavelet bands, by convolutions."""
        return published_haar(x)

    def pixels(self, bands: Tensor) -> Tensor:
        """Invert `bands`."""
        return published_inverse_haar(bands, self.config.in_channels)
